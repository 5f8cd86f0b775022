"""Files of the inbox that are known already: they were read before, or could not be taken.

scans/<inode, size and mtime>.json     figures of a file that was read and returned
claims/.untaken.json                   reasons of files that could not be taken
"""

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile

#: Delay until a file is tried again. Meanwhile it takes no place in the queue.
RETRY_SECONDS = 60.0


class FileScan(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a file that was read and returned to the inbox.

    Attributes:
        requests: Non-blank lines, faulty ones included.
        tokens: Expected, prompt and answer together.
        size_bytes: Uncompressed.
        arrived_at: First arrival in the inbox.
    """

    requests: int
    tokens: int
    size_bytes: int
    arrived_at: float


class FileScans:
    """The file scans of a data folder."""

    def __init__(self, folder: DataFolder) -> None:
        self._path = folder.scans

    @property
    def empty(self) -> bool:
        """Whether there are no scans."""
        with contextlib.suppress(FileNotFoundError):
            return not any(self._path.iterdir())
        return True

    def find(self, stats: os.stat_result) -> FileScan | None:
        """Return the scan of a file; None if the file was not read, or has changed since."""
        return self._file(stats).read_if_sound()  # else the file is read again

    def keep(self, stats: os.stat_result, scan: FileScan) -> None:
        """Record the scan of a file durably."""
        self._file(stats).write(scan)

    def forget_others(self, files: Collection[os.stat_result]) -> None:
        """Remove the scans of all but these files: the others are batches, or gone."""
        kept = {self._file(stats).path.name for stats in files}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._path) as entries:
            for entry in entries:
                if entry.name not in kept and not entry.name.startswith("."):
                    with contextlib.suppress(OSError):  # a folder, for example, is harmless
                        Path(entry.path).unlink(missing_ok=True)

    def _file(self, stats: os.stat_result) -> StateFile[FileScan]:
        # A rename changes none of the three; a write changes the mtime.
        key = f"{stats.st_ino:x}-{stats.st_size:x}-{stats.st_mtime_ns:x}"
        return StateFile(self._path / f"{key}.json", FileScan)


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
