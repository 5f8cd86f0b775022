"""Files of the inbox that recently could not be taken; each listing of the inbox shows the reason.

Stored in `claims/.untaken.json`.
"""

import os
from collections.abc import Mapping

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile

#: Delay until a file is tried again. Meanwhile it takes no place in the queue.
RETRY_SECONDS = 60.0


class Untaken(msgspec.Struct, frozen=True, kw_only=True):
    """Why a file could not be taken.

    Attributes:
        inode: Identifies the file: a new file of the same name has another inode.
        changed_ns: Its ctime, which changes with any remedy.
    """

    inode: int
    changed_ns: int
    reason: str
    at: float


class UntakenFiles:
    """The files that could not be taken, by their names within the inbox."""

    def __init__(self, folder: DataFolder) -> None:
        self._file = StateFile(folder.claims / ".untaken.json", dict[str, Untaken])

    def read(self) -> Mapping[str, Untaken]:
        """Return the recorded files; none if the record is unreadable, so all are tried again."""
        try:
            return self._file.read() or {}
        except StorageError:
            return {}

    def keep(self, found: Mapping[str, Untaken], *, now: float) -> None:
        """Record the files found now, and drop those older than `RETRY_SECONDS`."""
        before = self.read()
        fresh = {name: each for name, each in before.items() if now - each.at < RETRY_SECONDS}
        if (after := {**fresh, **found}) != before:
            self._file.write(after)


def reason_of(known: Untaken | None, stats: os.stat_result, *, now: float) -> str | None:
    """Return why a file is not tried again yet; None if it can be."""
    if known is None or (known.inode, known.changed_ns) != (stats.st_ino, stats.st_ctime_ns):
        return None
    return known.reason if 0 <= now - known.at < RETRY_SECONDS else None
