"""The outbox: the files that users receive, and the writing of requests to them line by line."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import AccountingError, OutboxUnwritable
from batch_orchestration.core.outcomes import Completion
from batch_orchestration.core.results import BatchTotals, SettledRequest
from batch_orchestration.delivery.lines import output_line
from batch_orchestration.files.atomic import make_folder, write_atomically
from batch_orchestration.reports.rendering import to_html
from batch_orchestration.workers.reporter import report_progress


@dataclass(frozen=True)
class OutboxFiles:
    """The files of a batch in its outbox folder, finished or not."""

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
        """One line per request answered so far, while the batch is not delivered."""
        return self.folder / "output.partial.jsonl"

    @property
    def partial_errors(self) -> Path:
        """One line per request failed so far, while the batch is not delivered."""
        return self.folder / "errors.partial.jsonl"

    @property
    def partial(self) -> bool:
        """Whether partial files exist: the batch is then not delivered."""
        return self.partial_output.exists() or self.partial_errors.exists()

    @property
    def report(self) -> Path:
        """The report as Markdown."""
        return self.folder / "report.md"

    @property
    def page(self) -> Path:
        """The report as a self-contained HTML page."""
        return self.folder / "report.html"


def write_lines(
    batch_id: str,
    settled: Iterable[SettledRequest],
    output: BinaryIO,
    errors: BinaryIO,
    totals: BatchTotals,
) -> None:
    """Write each request to one of the two files, durably, and count it in `totals`."""
    for request in settled:
        target = output if isinstance(request.outcome, Completion) else errors
        target.write(output_line(batch_id, request))
        totals.count(request)
        report_progress()
    # All steps that can fail come before the first of the two is renamed.
    flush(output)
    flush(errors)


def write_report(title: str, text: str, files: OutboxFiles) -> None:
    """Write a report, given as Markdown, durably: as an HTML page and as it is."""
    write_atomically(files.page, to_html(title, text).encode(errors="replace"))
    # Last, because its presence shows that all of the files are there.
    write_atomically(files.report, text.encode(errors="replace"))


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
    """Check that the outbox is writable before any work, and remove files of a killed assembly."""
    probe = files.folder / ".probe"
    try:
        make_folder(files.folder)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(files, error.strerror or str(error)) from error
    for left_over in files.folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            left_over.unlink()


def unwritable(files: OutboxFiles, reason: str) -> OutboxUnwritable:
    """Return an error whose message explains how to fix the cause."""
    return OutboxUnwritable(
        f"cannot write to {files.folder}: {reason}. All answers are safe in the store: "
        f"make room or mend the permissions, then materialize batch_output for "
        f"{files.folder.name} again"
    )
