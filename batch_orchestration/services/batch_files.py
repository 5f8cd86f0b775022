"""Opening a person's batch file, plain or gzip, and telling whether it holds still."""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self, cast

from batch_orchestration.domain.errors import FileRefused, FileStillChanging


def is_gzip_name(name: str) -> bool:
    """Whether a name says that the file is compressed."""
    return name.lower().endswith(".gz")


@contextlib.contextmanager
def open_batch_file(path: Path) -> Iterator[BinaryIO]:
    """Open a batch file for reading, expanded on the way if its name ends in `.gz`.

    Raises:
        FileRefused: It may not be read, or is no whole gzip file; also raised by reads in the body.
    """
    try:
        with path.open("rb") as file:
            if is_gzip_name(path.name):
                with gzip.GzipFile(fileobj=file) as expanded:
                    yield cast(BinaryIO, expanded)
            else:
                yield file
    except PermissionError as error:
        raise FileRefused(f"it cannot be read: {error.strerror}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FileRefused(f"it is not a whole gzip file: {error}") from error


@dataclass(frozen=True)
class Fingerprint:
    """What changes when somebody writes to a file."""

    path: Path
    size_bytes: int
    times: tuple[int, int, int]

    @classmethod
    def of(cls, path: Path) -> Self:
        """Take the fingerprint of a file."""
        stats = path.lstat()
        return cls(path, stats.st_size, (stats.st_mtime_ns, stats.st_ctime_ns, stats.st_ino))

    def verify(self) -> None:
        """Check that the file is as it was.

        Raises:
            FileStillChanging: It is not.
        """
        now = Fingerprint.of(self.path)
        if now.size_bytes != self.size_bytes:
            difference = f"{self.size_bytes:,} → {now.size_bytes:,} bytes"
            raise FileStillChanging(f"it changed while it was read ({difference})")
        if now != self:
            raise FileStillChanging("it changed while it was read")
