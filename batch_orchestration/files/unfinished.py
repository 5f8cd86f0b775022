"""The index of unfinished batches: the cost of a tick grows with these, not with all batches.

`unfinished/` has an empty file, named by the batch id, for each batch with changes on the disk that
may be missing from the store: a batch not yet in the store, a resumption, or an open replay.
Code that makes such a change calls `mark` first, so that a crash can leave a needless
mark but never a missing one. `lifecycle/unfinished.py` removes marks and adds missing ones.
"""

import contextlib
import os

from batch_orchestration.core.batches import can_be_id
from batch_orchestration.files.atomic import write_atomically
from batch_orchestration.files.data_folder import DataFolder

#: A file whose mtime is the time of the last search for missing marks. No id begins with a dot.
_SEARCHED = ".searched"


def marked(folder: DataFolder) -> list[str]:
    """Return the ids on the index, sorted; files whose names are not ids are ignored.

    If the index is missing or unreadable, the ids of all batches are returned.
    """
    try:
        names = {path.name for path in folder.unfinished.iterdir()}
    except OSError:
        names = set(all_ids(folder))
    return sorted(name for name in names if can_be_id(name) and not name.startswith("."))


def all_ids(folder: DataFolder) -> list[str]:
    """Return the ids of all batches on the disk, a number that only grows."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):  # an unused data folder
        names = [path.name for path in folder.batches.iterdir()]
    return sorted(filter(can_be_id, names))


def mark(folder: DataFolder, name: str) -> None:
    """Add a batch to the index, durably, or renew its mark.

    Raises:
        StorageError: The index cannot be written.
    """
    if folder.unfinished.is_dir():  # without the index, ticks read every batch
        write_atomically(folder.unfinished / name, b"")


def unmark(folder: DataFolder, name: str, *, older_than: float) -> None:
    """Remove a batch from the index if its mark was last renewed before `older_than`."""
    path = folder.unfinished / name
    # A mark that cannot be removed only adds a check to each tick.
    with contextlib.suppress(OSError):
        if path.stat().st_mtime < older_than:
            path.unlink()


def searched_at(folder: DataFolder) -> float | None:
    """Return the time of the last search of all batches; None if there was none."""
    try:
        return (folder.unfinished / _SEARCHED).stat().st_mtime
    except OSError:
        return None


def note_search(folder: DataFolder, *, at: float) -> None:
    """Record the time of a search of all batches.

    Raises:
        StorageError: The index cannot be written.
    """
    mark(folder, _SEARCHED)
    with contextlib.suppress(OSError):  # the next tick searches again
        os.utime(folder.unfinished / _SEARCHED, (at, at))
