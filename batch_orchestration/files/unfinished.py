"""The index of what is unfinished, so that ticks cost what is unfinished, not what ever was.

`unfinished/` has an empty file, named by its id, for each batch of which the disk may know more
than the store: one that the store has yet to be told of, one that somebody decided to go on with,
and one with a replay that is not over. Whoever makes such a thing calls `mark_unfinished` first:
a crash leaves a mark too many, never one too few. `lifecycle/unfinished.py` removes marks, and
finds what has none.
"""

import contextlib
import os

from batch_orchestration.core.batches import can_be_id
from batch_orchestration.files.data_folder import DataFolder

#: Its time is that of the last search for things without a mark. No id begins with a dot.
_SEARCHED = ".searched"


def marked(folder: DataFolder) -> list[str]:
    """Return the ids on the index, sorted; files that are not named like an id are left out.

    Without an index, or with one that cannot be read, everything is to be looked at.
    """
    try:
        names = {path.name for path in folder.unfinished.iterdir()}
    except OSError:
        names = set(all_ids(folder))
    return sorted(name for name in names if can_be_id(name) and not name.startswith("."))


def all_ids(folder: DataFolder) -> list[str]:
    """Return the ids of all batches on the disk: their number only grows."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):  # a data folder that was never used
        names = [path.name for path in folder.batches.iterdir()]
    return sorted(filter(can_be_id, names))


def unmark(folder: DataFolder, name: str, *, older_than: float) -> None:
    """Take a batch off the index, unless it was marked since, in POSIX seconds."""
    path = folder.unfinished / name
    # One that cannot be removed only costs a look at each tick.
    with contextlib.suppress(OSError):
        if path.stat().st_mtime < older_than:
            path.unlink()


def searched_at(folder: DataFolder) -> float | None:
    """Return when everything was last searched, in POSIX seconds; None if never."""
    try:
        return (folder.unfinished / _SEARCHED).stat().st_mtime
    except OSError:
        return None


def note_search(folder: DataFolder, *, at: float) -> None:
    """Keep that everything was searched.

    Raises:
        StorageError: It cannot be written.
    """
    folder.mark_unfinished(_SEARCHED)
    with contextlib.suppress(OSError):  # the next tick searches again
        os.utime(folder.unfinished / _SEARCHED, (at, at))
