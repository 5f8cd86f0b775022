"""Settled batches: batches that do not change any more, unless a person acts."""

from collections.abc import Iterable

from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import FINAL, RESUMABLE
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.operations import last_operation_at, replays_of


def settled_batches(records: Iterable[BatchRecord], folder: DataFolder) -> dict[str, float]:
    """Return the settled batches, each with the time since when it is settled.

    A settled batch was delivered, has no open replay, and was not resumed since. A batch that the
    store does not know, or whose files cannot be read, is not settled.
    """
    faults = Faults()
    found: dict[str, float] = {}
    for record in records:
        with faults.of(record.batch_id):
            if record.status in FINAL and not replays_of(record.batch_id, folder):
                since = _since(record, folder)
                found |= {} if since is None else {record.batch_id: since}
    faults.log()
    return found


def _since(record: BatchRecord, folder: DataFolder) -> float | None:
    ended_at = record.times.get(record.status)
    if ended_at is None:
        return None
    resumption = folder.resumption(record.batch_id).read()
    if record.status in RESUMABLE and resumption is not None and resumption.at > ended_at:
        return None
    return max(ended_at, last_operation_at(folder, record.batch_id))
