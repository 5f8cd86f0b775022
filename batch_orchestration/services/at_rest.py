"""Batches at rest: those that nothing more happens to, unless a person wants it."""

import logging
from collections.abc import Iterable, Mapping

from batch_orchestration.domain.commits import BatchRecord
from batch_orchestration.domain.errors import BatchOrchestrationError
from batch_orchestration.domain.lifecycle import FINAL, RESUMABLE
from batch_orchestration.domain.submissions import submission_of
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.operations import last_operation_at, open_replays

logger = logging.getLogger(__name__)


def batches_at_rest(records: Iterable[BatchRecord], folder: DataFolder) -> dict[str, float]:
    """Return the batches at rest, and since when they are, in POSIX seconds.

    Such a batch was delivered, has no replay that is not over, nobody has decided to go on with it,
    and if it is a part, all parts of its submission are at rest, and it is since the last of them
    is. What the store does not know, or what cannot be told from the disk, is not at rest.
    """
    replaying = {batch_id for batch_id, _ in open_replays(folder)}
    found = {
        record.batch_id: since
        for record in records
        if record.batch_id not in replaying
        and record.status in FINAL
        and (since := _since(record, folder)) is not None
    }
    whole = {batch_id: _since_whole(batch_id, found, folder) for batch_id in found}
    return {batch_id: since for batch_id, since in whole.items() if since is not None}


def _since(record: BatchRecord, folder: DataFolder) -> float | None:
    ended_at = record.times.get(record.status)
    if ended_at is None:
        return None
    try:
        resumption = folder.read_resumption(record.batch_id)
    except BatchOrchestrationError as error:
        logger.warning("%s is left alone: %s", record.batch_id, error)
        return None
    if record.status in RESUMABLE and resumption is not None and resumption.at > ended_at:
        return None
    return max(ended_at, last_operation_at(folder, record.batch_id))


def _since_whole(batch_id: str, found: Mapping[str, float], folder: DataFolder) -> float | None:
    """Return since when its submission rests; a batch that is no part is its own whole."""
    # The name alone costs nothing; whether it means that, the plan knows.
    if submission_of(batch_id) is None:
        return found[batch_id]
    try:
        part = folder.read_plan(batch_id).part
        if part is None:
            return found[batch_id]
        parts = folder.read_submission(part.submission).parts
    except BatchOrchestrationError as error:
        logger.warning("%s is left alone: %s", batch_id, error)
        return None
    return max(found[name] for name in parts) if found.keys() >= set(parts) else None
