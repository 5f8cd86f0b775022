"""Assembly: writes a batch's output and error files once every request has an outcome."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import AccountingError, Shortage
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.results import BatchRecord, BatchTotals, SettledRequest
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
from batch_orchestration.reports.gathering import gather_stats
from batch_orchestration.reports.rendering import batch_report
from batch_orchestration.reports.statistics import Latencies
from batch_orchestration.store.operations import Operations
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import holding
from batch_orchestration.workers.utilization import Utilization

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AssemblyReport:
    """The result of an assembly.

    Attributes:
        text: Content of `report.md`.
        early_end: The batch's early end; None if it had none.
        kept: Utilization of the batch's wall time; None if no run recorded a time breakdown.
        latencies: Of the batch's answers; None if it has none.
    """

    batch_id: str
    files: OutboxFiles
    totals: BatchTotals
    text: str
    early_end: EarlyEnd | None = None
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
    """Write a batch's output, errors and report, and set its status to `completed`.

    A batch that ends early becomes `cancelled` or `expired` instead; its unanswered requests must
    have been failed before (`lifecycle.fail_unanswered`).

    Both files appear whole, fsynced and in input order, and only if every request of the plan is in
    exactly one of them. `errors.jsonl` exists even if it is empty. Idempotent: a repeated call
    writes the same bytes, even after an interruption at any point. Concurrent calls for a batch run
    one after the other. Partial files are removed.

    Args:
        actor: Run or person, for the batch's history.

    Raises:
        BatchNotFound: There is no such batch.
        AccountingError: A request is missing or duplicated; the outbox is unchanged.
        OutboxUnwritable: No room or no permission; nothing is lost, and the call can be repeated.
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
            stats = gather_stats(plan, totals, folder=folder, store=store)
            text = batch_report(
                *(plan, record, totals, store.chunk_reports(batch_id)),
                outbox=str(files.folder),
                scored=scored,
                early_end=ending.early_end,
                stats=stats,
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
        early_end=ending.early_end,
        kept=stats.utilization,
        latencies=stats.latencies,
    )


def assembly_lock_path(batch_id: str, folder: DataFolder) -> Path:
    """Return the path of the lock that serializes deliveries of a batch."""
    # Not in the outbox, which belongs to users.
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
    """Write both files; they replace earlier ones only if every request is in exactly one."""
    totals = BatchTotals()
    with atomic_writer(files.output) as output:
        with atomic_writer(files.errors) as errors:
            write_lines(plan.batch_id, each_once(plan, settled), output, errors, totals)
            crash_point(CrashPoint.BEFORE_ERRORS_RENAME)
        crash_point(CrashPoint.BEFORE_OUTPUT_RENAME)
    return totals


def _remove_partial_files(files: OutboxFiles) -> None:
    """Remove the partial files that were written before the batch was finished."""
    with disk_errors(files.folder):
        files.partial_output.unlink(missing_ok=True)
        files.partial_errors.unlink(missing_ok=True)
