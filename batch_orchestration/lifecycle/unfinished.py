"""Maintenance of the index of unfinished batches: stale marks are removed, missing ones added.

The index is never trusted alone: the whole disk is searched at intervals, so that lost marks and
folders placed by hand are found.
"""

from batch_orchestration.admission.registration import is_planned
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.unfinished import (
    all_ids,
    mark,
    marked,
    note_search,
    searched_at,
    unmark,
)
from batch_orchestration.lifecycle.resumption import is_resumed
from batch_orchestration.store.operations import replays_of
from batch_orchestration.store.store import Store

#: Interval of the search for unmarked batches. Searching 10,000 batches takes about a second.
SEARCH_SECONDS = 900.0
#: Least age of a mark that is removed: a mark is made before the change for which it stands.
MARK_SECONDS = 600.0


def keep_index(*, folder: DataFolder, store: Store, now: float) -> list[str]:
    """Remove batches without pending work from the index; at intervals, add those that are missing.

    `dispatch_sensor` calls it at each tick.

    Returns:
        The ids that were missing.

    Raises:
        StorageError: The store cannot be read, or the index cannot be written.
    """
    names = marked(folder)
    found: list[str] = []
    last = searched_at(folder)
    if last is None or not 0 <= now - last < SEARCH_SECONDS:
        found = _search(folder, store, frozenset(names))
        note_search(folder, at=now)
    records = store.records(names)
    for name in names:
        if not _is_open(name, records.get(name), folder):
            unmark(folder, name, older_than=now - MARK_SECONDS)
    return found


def _search(folder: DataFolder, store: Store, known: frozenset[str]) -> list[str]:
    """Mark the batches on the disk that are missing from the index, and return their ids."""
    records = {record.batch_id: record for record in store.batches()}
    found = [
        name
        for name in all_ids(folder)
        if name not in known and _is_open(name, records.get(name), folder)
    ]
    for name in found:
        mark(folder, name)
    return found


def _is_open(name: str, record: BatchRecord | None, folder: DataFolder) -> bool:
    """Whether ticks must look at a batch on the disk."""
    with Faults().of(name):
        lost = record is None and is_planned(name, folder)
        resumed = record is not None and is_resumed(record, folder)
        return lost or resumed or bool(replays_of(name, folder))
    # The work on a damaged batch reports the damage; until then the batch stays on the index.
    return True
