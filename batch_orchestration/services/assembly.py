"""Assembly: writes a batch's output and error files once every request has an outcome."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from batch_orchestration.domain.batches import BatchPlan, BatchStatus
from batch_orchestration.domain.commits import BatchRecord, SettledRequest
from batch_orchestration.domain.errors import AccountingError, DiskFull, OutboxUnwritable
from batch_orchestration.domain.outcomes import Completion
from batch_orchestration.domain.output_lines import output_line
from batch_orchestration.services.crash_points import CrashPoint, crash_point
from batch_orchestration.services.reports import render_report
from batch_orchestration.services.tallies import Tally
from batch_orchestration.storage.files import (
    DataFolder,
    atomic_writer,
    disk_errors,
    write_atomically,
)
from batch_orchestration.storage.operations import Operations
from batch_orchestration.storage.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutboxFiles:
    """What a batch leaves in its folder of the outbox, finished or not."""

    folder: Path

    @property
    def output(self) -> Path:
        """One line per answered request."""
        return self.folder / "output.jsonl"

    @property
    def errors(self) -> Path:
        """One line per failed request; empty if there is none."""
        return self.folder / "errors.jsonl"

    @property
    def partial_output(self) -> Path:
        """Those that were answered when somebody asked, while the batch is not delivered yet."""
        return self.folder / "output.partial.jsonl"

    @property
    def partial_errors(self) -> Path:
        """The same for those that had failed."""
        return self.folder / "errors.partial.jsonl"

    @property
    def partial(self) -> bool:
        """Whether there are partial files: the batch then is not delivered."""
        return self.partial_output.exists() or self.partial_errors.exists()

    @property
    def report(self) -> Path:
        """The figures, for people."""
        return self.folder / "report.md"


@dataclass(frozen=True, kw_only=True)
class AssemblyReport:
    """What was assembled; `text` is that of `report.md`."""

    batch_id: str
    files: OutboxFiles
    tally: Tally
    text: str


def assemble(
    batch_id: str,
    *,
    folder: DataFolder,
    store: Store,
    clock: Callable[[], float],
    actor: str = "assembly",
) -> AssemblyReport:
    """Write output, errors and report of a batch; it then is `completed`.

    Both files appear whole and fsynced, in input order, and only if every request of the plan is
    in exactly one of them. `errors.jsonl` is there even if it is empty. Doing it again writes the
    same bytes, also after an interruption at any point; two callers take turns. Partial files are
    removed.

    Args:
        batch_id: Of the batch.
        folder: The data folder.
        store: The store.
        clock: POSIX seconds.
        actor: Run or person, for the batch's history.

    Raises:
        BatchNotFound: There is no such batch.
        AccountingError: A request is missing or there twice; the outbox is as it was.
        OutboxUnwritable: No room or no permission; nothing is lost, do it again.
    """
    plan = folder.read_plan(batch_id)
    files = OutboxFiles(folder.outbox_path(batch_id))
    with FileLock(assembly_lock_path(batch_id, folder)):
        Operations(folder, batch_id).apply_to(store)
        record = store.batch(batch_id)
        _require_all_committed(record)
        make_writable(files)
        if record.status is not BatchStatus.COMPLETED:
            reason = "every request has an outcome"
            store.set_status(
                batch_id, BatchStatus.FINALIZING, at=clock(), actor=actor, reason=reason
            )
        try:
            tally = _write_files(plan, store.settled(batch_id), files)
            chunks = store.chunk_reports(batch_id)
            text = render_report(plan, record, tally, chunks, outbox=str(files.folder))
            crash_point(CrashPoint.BEFORE_REPORT_RENAME)
            write_atomically(files.report, text.encode())
            crash_point(CrashPoint.AFTER_RENAMES)
            _remove_partial_files(files)
        except DiskFull as error:
            raise unwritable(files, str(error)) from error
        if record.status is not BatchStatus.COMPLETED:
            reason = f"{tally.completed:,} answered, {tally.failed:,} failed"
            store.set_status(
                batch_id, BatchStatus.COMPLETED, at=clock(), actor=actor, reason=reason
            )
    logger.info(
        "%s: %d answered, %d failed, in %s", batch_id, tally.completed, tally.failed, files.folder
    )
    return AssemblyReport(batch_id=batch_id, files=files, tally=tally, text=text)


def assembly_lock_path(batch_id: str, folder: DataFolder) -> Path:
    """Return the lock under which files of a batch are delivered."""
    # Not in the outbox, which belongs to people.
    return folder.plan_path(batch_id).with_name("assembly.lock")


def _require_all_committed(record: BatchRecord) -> None:
    if record.chunks_committed != record.chunks:
        raise AccountingError(
            f"batch {record.batch_id}: {record.chunks - record.chunks_committed} of "
            f"{record.chunks} chunks ({record.pending} requests) have no outcome yet; "
            "materialize the missing partitions of chunk_results first"
        )


def _write_files(plan: BatchPlan, settled: Iterable[SettledRequest], files: OutboxFiles) -> Tally:
    """Write both files; they replace earlier ones only if the sum rule holds."""
    tally = Tally()
    with atomic_writer(files.output) as output:
        with atomic_writer(files.errors) as errors:
            write_lines(plan.batch_id, _each_once(plan, settled), output, errors, tally)
            crash_point(CrashPoint.BEFORE_ERRORS_RENAME)
        crash_point(CrashPoint.BEFORE_OUTPUT_RENAME)
    return tally


def write_lines(
    batch_id: str,
    settled: Iterable[SettledRequest],
    output: BinaryIO,
    errors: BinaryIO,
    tally: Tally,
) -> None:
    """Write each request to one of two files, durably, and count it."""
    for request in settled:
        target = output if isinstance(request.outcome, Completion) else errors
        target.write(output_line(batch_id, request))
        tally.count(request)
    # Whatever can fail shall fail before the first of the two is renamed.
    _flush(output)
    _flush(errors)


def _remove_partial_files(files: OutboxFiles) -> None:
    """Remove what was written of a batch before it was finished."""
    with disk_errors(files.folder):
        files.partial_output.unlink(missing_ok=True)
        files.partial_errors.unlink(missing_ok=True)


def _each_once(plan: BatchPlan, settled: Iterable[SettledRequest]) -> Iterator[SettledRequest]:
    """Pass on the requests 0, 1, 2, … of the plan, every one, none twice."""
    expected = 0
    for request in settled:
        if request.index != expected:
            kind = "has no outcome" if request.index > expected else "comes twice or out of order"
            index = min(request.index, expected)
            raise AccountingError(f"batch {plan.batch_id}: request {index} {kind} in the store")
        yield request
        expected += 1
    if expected != plan.requests:
        raise AccountingError(
            f"batch {plan.batch_id}: the plan has {plan.requests} requests, "
            f"the store has outcomes of {expected}"
        )


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def make_writable(files: OutboxFiles) -> None:
    """Find out now, not after an hour of writing, and clear what a killed assembly left."""
    probe = files.folder / ".probe"
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(files, error.strerror or str(error)) from error
    for left_over in files.folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            left_over.unlink()


def unwritable(files: OutboxFiles, reason: str) -> OutboxUnwritable:
    """Return the error that says what to do about it."""
    return OutboxUnwritable(
        f"cannot write to {files.folder}: {reason}. All answers are safe in the store: "
        f"make room or mend the permissions, then materialize batch_output for "
        f"{files.folder.name} again"
    )
