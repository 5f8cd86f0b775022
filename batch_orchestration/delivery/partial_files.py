"""Partial output and error files of a batch that is not finished."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import Shortage
from batch_orchestration.core.results import BatchTotals
from batch_orchestration.delivery.assembly import AssemblyReport, assemble, assembly_lock_path
from batch_orchestration.delivery.finished_so_far import (
    FinishedSoFar,
    finished_so_far,
    read_finished,
)
from batch_orchestration.delivery.outbox import OutboxFiles, make_writable, unwritable, write_lines
from batch_orchestration.files.atomic import atomic_writer
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.sharing import shared_lock
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import holding

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PartialReport:
    """The result of delivering an unfinished batch.

    Attributes:
        status: Status of the batch, which the delivery does not change.
        totals: Requests that were written.
        total: Requests of the batch.
    """

    batch_id: str
    files: OutboxFiles
    status: BatchStatus
    totals: BatchTotals
    total: int


def deliver_what_is_there(
    batch_id: str,
    *,
    folder: DataFolder,
    store: Store,
    clock: Callable[[], float],
    actor: str,
    on_partial: Callable[[], None] = lambda: None,
) -> AssemblyReport | PartialReport:
    """Assemble a batch if every chunk is committed; otherwise write partial files.

    The partial files are `output.partial.jsonl` and `errors.partial.jsonl`. They affect neither the
    batch's status nor a run in progress. `assemble` removes them, and waits while they are written.

    Args:
        actor: Run or person that delivers.
        on_partial: Called before the first partial file is written.

    Raises:
        BatchNotFound: There is no such batch.
        OutboxUnwritable: No room or no permission.
        AccountingError: See `assemble`.
    """
    with holding(shared_lock(assembly_lock_path(batch_id, folder))):
        finished = finished_so_far(batch_id, folder=folder, store=store)
        if not finished.all_committed:
            on_partial()
            return _write_partial(finished, folder, store)
    return assemble(batch_id, folder=folder, store=store, clock=clock, actor=actor)


def _write_partial(finished: FinishedSoFar, folder: DataFolder, store: Store) -> PartialReport:
    batch_id, totals = finished.plan.batch_id, BatchTotals()
    files = OutboxFiles(folder.outbox_path(batch_id))
    make_writable(files)
    try:
        with (
            atomic_writer(files.partial_output) as output,
            atomic_writer(files.partial_errors) as errors,
        ):
            settled = read_finished(finished, folder=folder, store=store)
            write_lines(batch_id, settled, output, errors, totals)
    except Shortage as error:
        raise unwritable(files, str(error)) from error
    logger.info(
        "%s: partial, %d of %d requests, in %s",
        *(batch_id, totals.total, finished.total, files.folder),
    )
    return PartialReport(
        batch_id=batch_id, files=files, status=finished.status, totals=totals, total=finished.total
    )
