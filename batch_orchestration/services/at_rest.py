"""Batches at rest: those that nothing more happens to, unless a person wants it."""

from collections.abc import Iterable, Mapping

from batch_orchestration.domain.commits import BatchRecord
from batch_orchestration.domain.lifecycle import FINAL, RESUMABLE
from batch_orchestration.domain.members import Faults
from batch_orchestration.domain.submissions import submission_of
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.operations import last_operation_at, replays_of


def batches_at_rest(records: Iterable[BatchRecord], folder: DataFolder) -> dict[str, float]:
    """Return the batches at rest, and since when they are, in POSIX seconds.

    Such a batch was delivered, has no replay that is not over, nobody has decided to go on with it,
    and if it is a part, all parts of its submission are at rest, and it is since the last of them
    is. What the store does not know, or what cannot be told from the disk, is not at rest.
    """
    faults = Faults()
    found: dict[str, float] = {}
    for record in records:
        with faults.of(record.batch_id):
            if record.status in FINAL and not replays_of(record.batch_id, folder):
                since = _since(record, folder)
                found |= {} if since is None else {record.batch_id: since}
    whole: dict[str, float] = {}
    for batch_id in found:
        with faults.of(batch_id):
            since = _since_whole(batch_id, found, folder)
            whole |= {} if since is None else {batch_id: since}
    faults.log()
    return whole


def _since(record: BatchRecord, folder: DataFolder) -> float | None:
    ended_at = record.times.get(record.status)
    if ended_at is None:
        return None
    resumption = folder.read_resumption(record.batch_id)
    if record.status in RESUMABLE and resumption is not None and resumption.at > ended_at:
        return None
    return max(ended_at, last_operation_at(folder, record.batch_id))


def _since_whole(batch_id: str, found: Mapping[str, float], folder: DataFolder) -> float | None:
    """Return since when its submission rests; a batch that is no part is its own whole."""
    # The name alone costs nothing; whether it means that, the plan knows.
    if submission_of(batch_id) is None:
        return found[batch_id]
    part = folder.read_plan(batch_id).part
    if part is None:
        return found[batch_id]
    parts = folder.read_submission(part.submission).parts
    return max(found[name] for name in parts) if found.keys() >= set(parts) else None
