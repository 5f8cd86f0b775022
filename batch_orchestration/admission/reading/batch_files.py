"""Opening a user's batch file, plain or gzip, and detecting changes to it."""

import contextlib
import gzip
import io
import os
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self, cast

from batch_orchestration.core.errors import FileRefused, FileStillChanging

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MAX_BYTES_SETTING = "BATCH_MAX_FILE_BYTES"
_BLOCK_BYTES = 2**17

#: Linux takes file times from a clock that ticks every 1 to 10 ms.
_TICK_SECONDS = 0.02
_LOOKS = 5


def is_gzip_name(name: str) -> bool:
    """Whether the file of this name is compressed."""
    return name.lower().endswith(".gz")


def is_batch_file_name(name: str) -> bool:
    """Whether a name has the ending of a batch file, in upper or lower case."""
    return name.lower().endswith((".jsonl", ".jsonl.gz"))


@contextlib.contextmanager
def open_batch_file(path: Path, *, max_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a batch file for reading, and expand it if its name ends in `.gz`.

    Args:
        max_bytes: Limit of the expanded content; no more is ever read. None for no limit.

    Raises:
        FileRefused: The file is too large, not readable, or not a complete gzip file; also raised
            by reads in the body.
    """
    try:
        with path.open("rb") as file:
            if is_gzip_name(path.name):
                with gzip.GzipFile(fileobj=file) as expanded:
                    yield _limited(expanded, max_bytes)
            else:
                _check_size(path, max_bytes)
                yield file
    except PermissionError as error:
        raise FileRefused(f"it cannot be read: {error.strerror}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FileRefused(f"it is not a whole gzip file: {error}") from error


def _check_size(path: Path, max_bytes: int | None) -> None:
    size = path.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise FileRefused(
            f"it has {size:,} bytes, more than the {max_bytes:,} that {_MAX_BYTES_SETTING} allows;"
            " cut it into several files, or raise the setting"
        )


def _limited(expanded: gzip.GzipFile, max_bytes: int | None) -> BinaryIO:
    if max_bytes is None:
        return cast(BinaryIO, expanded)
    return io.BufferedReader(_Limited(expanded, max_bytes), _BLOCK_BYTES)


class _Limited(io.RawIOBase):
    """Refuses to expand more than `max_bytes`: a small file may expand to any size."""

    def __init__(self, expanded: gzip.GzipFile, max_bytes: int) -> None:
        self._expanded = expanded
        self._max_bytes = self._left = max_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = self._expanded.seek(offset, whence)
        self._left = self._max_bytes - place
        return place

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        data = self._expanded.read1(len(view))
        self._left -= len(data)
        if self._left < 0:
            raise FileRefused(
                f"it expands to more than the {self._max_bytes:,} bytes that {_MAX_BYTES_SETTING}"
                " allows; cut it into several files, or raise the setting"
            )
        view[: len(data)] = data
        return len(data)


@dataclass(frozen=True)
class Fingerprint:
    """The attributes of a file that change with every write."""

    path: Path
    size_bytes: int
    times: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path) -> Self:
        """Take the fingerprint of a file, after a short wait if it was just written.

        Raises:
            FileStillChanging: The file is being written continuously.
        """
        for _ in range(_LOOKS):
            stats = path.lstat()
            if not 0 <= time.time() - max(stats.st_mtime, stats.st_ctime) < _TICK_SECONDS:
                return cls._of(path, stats)
            # Writes within one tick of the clock leave the same times.
            time.sleep(_TICK_SECONDS)
        raise FileStillChanging("it is being written to all the while")

    @classmethod
    def _of(cls, path: Path, stats: os.stat_result) -> Self:
        return cls(path, stats.st_size, (stats.st_mtime_ns, stats.st_ctime_ns, stats.st_ino))

    def verify(self) -> None:
        """Check that the file has not changed.

        Raises:
            FileStillChanging: The file has changed.
        """
        now = Fingerprint._of(self.path, self.path.lstat())
        if now.size_bytes != self.size_bytes:
            difference = f"{self.size_bytes:,} → {now.size_bytes:,} bytes"
            raise FileStillChanging(f"it changed while it was read ({difference})")
        if now != self:
            raise FileStillChanging("it changed while it was read")
