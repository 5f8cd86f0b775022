"""Keeping the index of what is unfinished: who may go, and who is missing.

The index is never trusted: everything on the disk is searched now and then, so that a mark that
was lost, or a folder that somebody put in its place by hand, is found all the same.
"""

from batch_orchestration.admission.registration import is_planned
from batch_orchestration.core.members import Faults
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.unfinished import all_ids, marked, note_search, searched_at, unmark
from batch_orchestration.lifecycle.resumption import is_resumed
from batch_orchestration.store.operations import replays_of
from batch_orchestration.store.store import Store

#: What is on the disk without a mark is found after so long. Searching 10,000 batches takes about
#: a second.
SEARCH_SECONDS = 900.0
#: A mark stays so long at least: who made it may not have made yet what it stands for.
MARK_SECONDS = 600.0


def keep_index(*, folder: DataFolder, store: Store, now: float) -> list[str]:
    """Take off the index what nothing is to be done about; now and then search for what is missing.

    Done by `dispatch_sensor` at each tick.

    Returns:
        The ids that were missing.

    Raises:
        StorageError: The store cannot be read, or the index not be written.
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
    """Mark what lies on the disk and should be on the index; return it."""
    records = {record.batch_id: record for record in store.batches()}
    found = [
        name
        for name in all_ids(folder)
        if name not in known and _is_open(name, records.get(name), folder)
    ]
    for name in found:
        folder.mark_unfinished(name)
    return found


def _is_open(name: str, record: BatchRecord | None, folder: DataFolder) -> bool:
    """Whether ticks have to look at a batch on the disk."""
    with Faults().of(name):
        lost = record is None and is_planned(name, folder)
        resumed = record is not None and is_resumed(record, folder)
        return lost or resumed or bool(replays_of(name, folder))
    # What is damaged is for those to tell who work on it; until then it stays in sight.
    return True
