"""The outbox: the files that users receive, complete or partial, and the one writer of them."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import AccountingError, OutboxUnwritable
from batch_orchestration.core.outcomes import Completion
from batch_orchestration.core.results import BatchTotals, SettledRequest
from batch_orchestration.delivery.lines import output_line
from batch_orchestration.files.atomic import (
    atomic_writer,
    disk_errors,
    make_folder,
    write_atomically,
)
from batch_orchestration.reports.rendering import to_html
from batch_orchestration.workers.reporter import report_progress


@dataclass(frozen=True)
class OutboxFiles:
    """The files of a batch in its outbox folder.

    Attributes:
        partial: Whether they contain the outcomes so far, and the batch is not delivered.
    """

    folder: Path
    partial: bool = False

    @classmethod
    def present(cls, folder: Path) -> Self:
        """Return the partial files if there are any, otherwise the complete ones."""
        partial = cls(folder, partial=True)
        return partial if partial.output.exists() or partial.errors.exists() else cls(folder)

    @property
    def output(self) -> Path:
        """One line per answered request."""
        return self._path("output")

    @property
    def errors(self) -> Path:
        """One line per failed request; empty if there is none."""
        return self._path("errors")

    @property
    def report(self) -> Path:
        """The report as Markdown; only complete files have one."""
        return self.folder / "report.md"

    @property
    def page(self) -> Path:
        """The report as a self-contained HTML page."""
        return self.folder / "report.html"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{'.partial' if self.partial else ''}.jsonl"


def write_files(
    batch_id: str, settled: Iterable[SettledRequest], files: OutboxFiles
) -> BatchTotals:
    """Write each request to one of the two files, durably, and return the totals.

    If `settled` raises, earlier files are left unchanged.
    """
    totals = BatchTotals()
    with atomic_writer(files.output) as output:
        with atomic_writer(files.errors) as errors:
            for request in settled:
                target = output if isinstance(request.outcome, Completion) else errors
                target.write(output_line(batch_id, request))
                totals.count(request)
                report_progress()
            # All steps that can fail come before the first of the two is renamed.
            flush(output)
            flush(errors)
            crash_point(CrashPoint.BEFORE_ERRORS_RENAME)
        crash_point(CrashPoint.BEFORE_OUTPUT_RENAME)
    return totals


def write_report(title: str, text: str, files: OutboxFiles) -> None:
    """Write a report, given as Markdown, durably: as an HTML page and as it is."""
    write_atomically(files.page, to_html(title, text).encode(errors="replace"))
    # Last, because its presence shows that all of the files are there.
    write_atomically(files.report, text.encode(errors="replace"))


def remove_partial_files(folder: Path) -> None:
    """Remove the partial files of a batch whose complete files are in place."""
    partial = OutboxFiles(folder, partial=True)
    with disk_errors(folder):
        partial.output.unlink(missing_ok=True)
        partial.errors.unlink(missing_ok=True)


def each_once(plan: BatchPlan, settled: Iterable[SettledRequest]) -> Iterator[SettledRequest]:
    """Pass on the requests 0, 1, 2, … of the plan, each exactly once.

    Raises:
        AccountingError: A request is missing, duplicated or out of order.
    """
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


def flush(file: BinaryIO) -> None:
    """Make everything written so far survive a power loss."""
    file.flush()
    os.fsync(file.fileno())


def make_writable(files: OutboxFiles) -> None:
    """Check that the outbox is writable before any work, and remove files of a killed delivery."""
    probe = files.folder / ".probe"
    try:
        make_folder(files.folder)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(files, error.strerror or str(error)) from error
    for stale in files.folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            stale.unlink()


def unwritable(files: OutboxFiles, reason: str) -> OutboxUnwritable:
    """Return an error whose message explains how to fix the cause."""
    return OutboxUnwritable(
        f"cannot write to {files.folder}: {reason}. All answers are safe in the store: "
        f"make room or correct the permissions, then materialize batch_output for "
        f"{files.folder.name} again"
    )
