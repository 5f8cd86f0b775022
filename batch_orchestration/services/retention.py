"""Retention: journals of batches that were delivered long ago are removed.

Each answer is then in the store and in the output, no longer in a journal: `recover` cannot make
the batch's rows anew, and leaves the batch out. `pruned.json` in the batch's folder says so; it is
there before the first journal goes, so that no run takes a missing journal for missing answers.
"""

import logging
from pathlib import Path

import msgspec
from filelock import FileLock

from batch_orchestration.domain.batches import BatchStatus
from batch_orchestration.domain.errors import BatchOrchestrationError
from batch_orchestration.services.assembly import assembly_lock_path
from batch_orchestration.services.outbox import OutboxFiles
from batch_orchestration.services.recount import recount
from batch_orchestration.storage.files import DataFolder, disk_errors, write_atomically
from batch_orchestration.storage.operations import open_replays
from batch_orchestration.storage.store import Store

logger = logging.getLogger(__name__)


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """That the journals of a batch were removed, and when (POSIX seconds)."""

    at: float


def prune_journals(
    *, folder: DataFolder, store: Store, now: float, keep_seconds: float
) -> list[str]:
    """Remove the journals of batches that were completed so long ago; return those batches.

    Only if the files in the outbox, counted anew, have every request once. Journals of replays
    stay, and all journals of a batch with a replay that is not over.

    Raises:
        StorageError: The store cannot be read.
    """
    replaying = {batch_id for batch_id, _ in open_replays(folder)}
    pruned = []
    for record in store.batches():
        completed_at = record.times.get(BatchStatus.COMPLETED)
        if record.status is not BatchStatus.COMPLETED or completed_at is None:
            continue
        if completed_at + keep_seconds > now or record.batch_id in replaying:
            continue
        try:
            if _prune(record.batch_id, folder, now=now):
                pruned.append(record.batch_id)
        except BatchOrchestrationError as error:
            logger.warning("the journals of %s stay: %s", record.batch_id, error)
    return pruned


def _prune(batch_id: str, folder: DataFolder, *, now: float) -> bool:
    journals = _journals(batch_id, folder)
    if not journals:
        return False
    with FileLock(assembly_lock_path(batch_id, folder)):
        if not folder.pruned_path(batch_id).exists():
            counted = recount(folder.read_plan(batch_id), OutboxFiles(folder.outbox_path(batch_id)))
            if counted.problem is not None or counted.partial:
                logger.warning("the journals of %s stay: %s", batch_id, counted.problem)
                return False
            write_atomically(folder.pruned_path(batch_id), msgspec.json.encode(Pruned(at=now)))
        for journal in journals:
            with disk_errors(journal):
                journal.unlink(missing_ok=True)
    logger.info("removed %d journals of %s, delivered long ago", len(journals), batch_id)
    return True


def _journals(batch_id: str, folder: DataFolder) -> list[Path]:
    return list(folder.journal_path(batch_id, 0).parent.glob("*.journal"))
