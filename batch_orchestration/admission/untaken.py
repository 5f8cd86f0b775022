"""Files of the inbox that could not be taken lately, and why: told by every look at the inbox.

claims/.untaken.json
"""

import os
from collections.abc import Mapping

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.atomic import read_kept, write_atomically
from batch_orchestration.files.data_folder import DataFolder

#: Then it is tried again. Meanwhile it takes nobody's place in the queue.
RETRY_SECONDS = 60.0


class Untaken(msgspec.Struct, frozen=True, kw_only=True):
    """Why a file could not be taken.

    Attributes:
        inode: Of the file; another one under its name is another file.
        changed_ns: Its ctime: whatever a person does about it moves that.
        at: POSIX seconds.
    """

    inode: int
    changed_ns: int
    reason: str
    at: float


class UntakenFiles:
    """What is known of files that could not be taken, by their names within the inbox."""

    def __init__(self, folder: DataFolder) -> None:
        self._path = folder.claims / ".untaken.json"

    def read(self) -> Mapping[str, Untaken]:
        """Return what is known; nothing, if it cannot be read: all are then tried again."""
        try:
            return read_kept(self._path, dict[str, Untaken]) or {}
        except StorageError:
            return {}

    def keep(self, found: Mapping[str, Untaken], *, now: float) -> None:
        """Keep what was found now, beside what is not old."""
        before = self.read()
        fresh = {name: each for name, each in before.items() if now - each.at < RETRY_SECONDS}
        if (after := {**fresh, **found}) != before:
            write_atomically(self._path, msgspec.json.encode(after))


def reason_of(known: Untaken | None, stats: os.stat_result, *, now: float) -> str | None:
    """Return why a file is not tried now; None if it is."""
    if known is None or (known.inode, known.changed_ns) != (stats.st_ino, stats.st_ctime_ns):
        return None
    return known.reason if 0 <= now - known.at < RETRY_SECONDS else None
