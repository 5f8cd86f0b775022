"""Assembly: writes a batch's output and error files once every request has an outcome."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import AccountingError, Shortage
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.results import BatchRecord, SettledRequest
from batch_orchestration.core.totals import BatchTotals
from batch_orchestration.delivery.outbox import (
    OutboxFiles,
    each_once,
    make_writable,
    unwritable,
    write_lines,
    write_report,
)
from batch_orchestration.estimates.scoring import score_batch
from batch_orchestration.files.atomic import atomic_writer, disk_errors
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.sharing import shared_lock
from batch_orchestration.lifecycle.completion import begin_ending, finish_ending
from batch_orchestration.reports.figures import Latencies
from batch_orchestration.reports.gathering import gather_figures
from batch_orchestration.reports.report import batch_report
from batch_orchestration.store.operations import Operations
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import holding
from batch_orchestration.workers.utilization import Utilization

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AssemblyReport:
    """What was assembled; `text` is that of `report.md`.

    Attributes:
        closing: Why the batch ended early; None if it did not.
        kept: Where its wall time went; None if no run kept an account.
        latencies: Of its answers; None if there is none.
    """

    batch_id: str
    files: OutboxFiles
    totals: BatchTotals
    text: str
    closing: EarlyEnd | None = None
    kept: Utilization | None = None
    latencies: Latencies | None = None


def assemble(
    batch_id: str,
    *,
    folder: DataFolder,
    store: Store,
    clock: Callable[[], float],
    actor: str = "assembly",
) -> AssemblyReport:
    """Write output, errors and report of a batch; it then is `completed`.

    One that ends early (and was closed out before) is `cancelled` or `expired` then.

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
    with holding(shared_lock(assembly_lock_path(batch_id, folder))):
        Operations(folder, batch_id).apply_to(store)
        record = store.batch(batch_id)
        _require_all_committed(record)
        make_writable(files)
        ending = begin_ending(batch_id, folder=folder, store=store, at=clock(), actor=actor)
        try:
            totals = _write_files(plan, store.settled(batch_id), files)
            scored = score_batch(plan, totals, folder=folder, store=store, clock=clock)
            figures = gather_figures(plan, totals, folder=folder, store=store)
            text = batch_report(
                *(plan, record, totals, store.chunk_reports(batch_id)),
                outbox=str(files.folder),
                scored=scored,
                closing=ending.closing,
                figures=figures,
            )
            crash_point(CrashPoint.BEFORE_REPORT_RENAME)
            write_report(batch_id, text, files)
            crash_point(CrashPoint.AFTER_RENAMES)
            _remove_partial_files(files)
        except Shortage as error:
            raise unwritable(files, str(error)) from error
        reason = f"{totals.completed:,} answered, {totals.failed:,} failed"
        finish_ending(ending, folder=folder, store=store, at=clock(), actor=actor, reason=reason)
    logger.info("%s: %s, in %s", batch_id, reason, files.folder)
    return AssemblyReport(
        batch_id=batch_id,
        files=files,
        totals=totals,
        text=text,
        closing=ending.closing,
        kept=figures.kept,
        latencies=figures.latencies,
    )


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


def _write_files(
    plan: BatchPlan, settled: Iterable[SettledRequest], files: OutboxFiles
) -> BatchTotals:
    """Write both files; they replace earlier ones only if the sum rule holds."""
    totals = BatchTotals()
    with atomic_writer(files.output) as output:
        with atomic_writer(files.errors) as errors:
            write_lines(plan.batch_id, each_once(plan, settled), output, errors, totals)
            crash_point(CrashPoint.BEFORE_ERRORS_RENAME)
        crash_point(CrashPoint.BEFORE_OUTPUT_RENAME)
    return totals


def _remove_partial_files(files: OutboxFiles) -> None:
    """Remove what was written of a batch before it was finished."""
    with disk_errors(files.folder):
        files.partial_output.unlink(missing_ok=True)
        files.partial_errors.unlink(missing_ok=True)
