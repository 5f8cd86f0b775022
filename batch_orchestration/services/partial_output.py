"""Partial output: files in the outbox of a batch that is not delivered yet.

They stand beside the place of the real ones, under other names, until those are there.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import Shortage
from batch_orchestration.core.totals import Tally
from batch_orchestration.files.atomic import atomic_writer
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.sharing import shared_lock
from batch_orchestration.services.assembly import AssemblyReport, assemble, assembly_lock_path
from batch_orchestration.services.outbox import OutboxFiles, make_writable, unwritable, write_lines
from batch_orchestration.services.partial_results import (
    FinishedSoFar,
    finished_so_far,
    read_finished,
)
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import holding

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PartialReport:
    """What was written of an unfinished batch.

    Attributes:
        status: Of the batch, which was left as it is.
        total: Requests of the batch; the tally has those that were written.
    """

    batch_id: str
    files: OutboxFiles
    status: BatchStatus
    tally: Tally
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
    """Assemble a batch if every chunk is committed, else write its finished requests apart.

    The partial files are `output.partial.jsonl` and `errors.partial.jsonl`. The status of the
    batch is not changed by them, and a run that works on it is not disturbed. `assemble` removes
    them, and waits for its turn while they are written.

    Args:
        batch_id: Of the batch.
        folder: The data folder.
        store: Of the folder.
        clock: POSIX seconds.
        actor: Who delivers: a run, or a person.
        on_partial: Called before the first of the partial files is written.

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
    batch_id, tally = finished.plan.batch_id, Tally()
    files = OutboxFiles(folder.outbox_path(batch_id))
    make_writable(files)
    try:
        with (
            atomic_writer(files.partial_output) as output,
            atomic_writer(files.partial_errors) as errors,
        ):
            settled = read_finished(finished, folder=folder, store=store)
            write_lines(batch_id, settled, output, errors, tally)
    except Shortage as error:
        raise unwritable(files, str(error)) from error
    logger.info(
        "%s: partial, %d of %d requests, in %s",
        *(batch_id, tally.total, finished.total, files.folder),
    )
    return PartialReport(
        batch_id=batch_id, files=files, status=finished.status, tally=tally, total=finished.total
    )
