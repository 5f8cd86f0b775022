"""Atomic and durable writes, and what the disk says when they fail."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from batch_orchestration.core.errors import DiskFull, FileDamaged, StorageError, TooManyOpenFiles
from batch_orchestration.files.regular import NO_DESCRIPTOR, open_regular

#: No blocks, no quota, or the process's own limit on the size of files.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: Temporary names stay well below the 255 bytes that file systems allow.
_NAME_KEPT = 40
Kept = TypeVar("Kept")


def read_kept(path: Path, kind: type[Kept]) -> Kept | None:
    """Return what is kept in a small JSON file; None if nothing is there.

    The one reader of such files, so that damage always has the same exception. It never waits: a
    pipe or a socket in the file's place is damage, as is a link that leads nowhere.

    Raises:
        FileDamaged: Something is there that is no such file, or cannot be read.
        TooManyOpenFiles: It cannot be read just now.
    """
    try:
        with open_regular(path) as file:
            data = file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FileDamaged(path, f"cannot be read: {error.strerror or error}") from error
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "is empty" if not data else f"is damaged: {error}"
        raise FileDamaged(path, reason) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file durably: readers and crashes see the old content or the new, nothing between."""
    with atomic_writer(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a stream that becomes `path`, durably, at the end of a body that does not raise.

    Missing folders are made. If the body raises, `path` is as before and no rest is left.

    Raises:
        Shortage: There is no room, whether found by the body or at the end, or no descriptor.
        StorageError: The folder cannot be written.
    """
    temporary = path.with_name(f".{path.name[:_NAME_KEPT]}.{secrets.token_hex(6)}.tmp")
    with disk_errors(path):
        make_folder(path.parent)
        file = temporary.open("xb")
    try:
        # Closing writes what is left in the buffer, and may be what finds the disk full.
        with shortages(path), file:
            yield file
            with disk_errors(path):
                file.flush()
                os.fsync(file.fileno())
        with disk_errors(path):
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make creations and renames in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into `StorageError`, a lack of room into `Shortage`."""
    try:
        with shortages(path):
            yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Make a folder and every one above it that is missing, so that all survive a power loss.

    Raises:
        OSError: It cannot be made.
    """
    missing = [folder, *folder.parents]
    missing = missing[: next(n for n, each in enumerate(missing) if each.exists())]
    for each in reversed(missing):
        # Somebody else may make the same one meanwhile; who syncs it does not matter.
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)
    if not missing:
        folder.mkdir(exist_ok=True)  # raises if it is no folder


@contextlib.contextmanager
def shortages(path: Path) -> Iterator[None]:
    """Turn a lack of room or of descriptors into `Shortage`, and let every other error pass."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"no room to write {path}: {error.strerror}") from error
        if error.errno in NO_DESCRIPTOR:
            raise TooManyOpenFiles(f"cannot open {path}: {error.strerror}") from error
        raise
