"""Delivery: writes a batch's output and error files, complete or with the outcomes so far."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import AccountingError, Shortage
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.results import BatchRecord, BatchTotals
from batch_orchestration.delivery.outbox import (
    OutboxFiles,
    each_once,
    make_writable,
    remove_partial_files,
    unwritable,
    write_files,
    write_report,
)
from batch_orchestration.delivery.snapshot import read_snapshot, take_snapshot
from batch_orchestration.estimates.scoring import score_batch
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
class Delivery:
    """The result of a delivery; the attributes after `total` belong to complete files only.

    Attributes:
        status: Status of the batch after the delivery; partial files do not change it.
        totals: Requests that were written.
        total: Requests of the batch.
        text: Content of `report.md`.
        early_end: The batch's early end; None if it had none.
        utilization: Utilization of the batch's wall time; None if no run recorded a time breakdown.
        latencies: Of the batch's answers; None if it has none.
    """

    files: OutboxFiles
    status: BatchStatus
    totals: BatchTotals
    total: int
    text: str = ""
    early_end: EarlyEnd | None = None
    utilization: Utilization | None = None
    latencies: Latencies | None = None


def assemble(
    batch_id: str,
    *,
    folder: DataFolder,
    store: Store,
    clock: Callable[[], float],
    actor: str = "assembly",
) -> Delivery:
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
    with holding(shared_lock(delivery_lock_path(batch_id, folder))):
        Operations(folder, batch_id).apply_to(store)
        record = store.batch(batch_id)
        _require_all_committed(record)
        make_writable(files)
        ending = begin_ending(batch_id, folder=folder, store=store, at=clock(), actor=actor)
        try:
            totals = write_files(batch_id, each_once(plan, store.settled(batch_id)), files)
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
            remove_partial_files(files.folder)
        except Shortage as error:
            raise unwritable(files, str(error)) from error
        reason = f"{totals.completed:,} answered, {totals.failed:,} failed"
        finish_ending(ending, folder=folder, store=store, at=clock(), actor=actor, reason=reason)
    logger.info("%s: %s, in %s", batch_id, reason, files.folder)
    return Delivery(
        files=files,
        status=ending.status,
        totals=totals,
        total=plan.requests,
        text=text,
        early_end=ending.early_end,
        utilization=stats.utilization,
        latencies=stats.latencies,
    )


def deliver(
    batch_id: str,
    *,
    folder: DataFolder,
    store: Store,
    clock: Callable[[], float],
    actor: str,
    on_partial: Callable[[], None] = lambda: None,
) -> Delivery:
    """Assemble a batch if every chunk is committed; otherwise write partial files.

    The partial files are `output.partial.jsonl` and `errors.partial.jsonl`. They affect neither the
    batch's status nor a run in progress. `assemble` removes them, and waits while they are written.

    Args:
        actor: Run or person that delivers.
        on_partial: Called before partial files are written, once it is certain that the call writes
            none but them, however it ends.

    Raises:
        BatchNotFound: There is no such batch.
        OutboxUnwritable: No room or no permission.
        AccountingError: See `assemble`.
    """
    with holding(shared_lock(delivery_lock_path(batch_id, folder))):
        snapshot = take_snapshot(batch_id, folder=folder, store=store)
        if not snapshot.all_committed:
            on_partial()
            files = OutboxFiles(folder.outbox_path(batch_id), partial=True)
            make_writable(files)
            settled = read_snapshot(snapshot, folder=folder, store=store)
            try:
                totals = write_files(batch_id, settled, files)
            except Shortage as error:
                raise unwritable(files, str(error)) from error
            logger.info(
                "%s: partial, %d of %d requests, in %s",
                *(batch_id, totals.total, snapshot.total, files.folder),
            )
            return Delivery(
                files=files, status=snapshot.status, totals=totals, total=snapshot.total
            )
    return assemble(batch_id, folder=folder, store=store, clock=clock, actor=actor)


def delivery_lock_path(batch_id: str, folder: DataFolder) -> Path:
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
