"""Atomic and durable writes, and exceptions for disk errors."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from batch_orchestration.core.errors import DiskFull, StorageError, TooManyOpenFiles
from batch_orchestration.files.regular import NO_DESCRIPTOR

#: No blocks left, quota used up, or the process's own limit on file size reached.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
#: Characters of the name kept in a temporary name, well below the file systems' 255 bytes.
_NAME_KEPT = 40


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file durably: readers see the old content or the new, also after a crash."""
    with atomic_writer(path) as file:
        file.write(data)


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Open a stream whose content durably replaces `path` at the end of the context.

    Missing folders are created. If the body raises, `path` is unchanged and no temporary file is
    left.

    Raises:
        Shortage: No space or no descriptor is left, in the body or at its end.
        StorageError: The folder cannot be written.
    """
    temporary = path.with_name(f".{path.name[:_NAME_KEPT]}.{secrets.token_hex(6)}.tmp")
    with disk_errors(path):
        make_folder(path.parent)
        file = temporary.open("xb")
    try:
        # Closing flushes the buffer, and so may find the disk full.
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
    """Make creations and renames in a folder durable across a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Convert `OSError` to `StorageError`; a lack of space or descriptors to `Shortage`."""
    try:
        with shortages(path):
            yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents, durable across a power loss.

    Raises:
        OSError: A folder cannot be created.
    """
    missing = [folder, *folder.parents]
    missing = missing[: next(n for n, each in enumerate(missing) if each.exists())]
    for each in reversed(missing):
        # Another process may create the same folder meanwhile; either may sync it.
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)
    if not missing:
        folder.mkdir(exist_ok=True)  # raises if the path is not a folder


@contextlib.contextmanager
def shortages(path: Path) -> Iterator[None]:
    """Convert a lack of space or descriptors to `Shortage`; other errors propagate unchanged."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise DiskFull(f"no room to write {path}: {error.strerror}") from error
        if error.errno in NO_DESCRIPTOR:
            raise TooManyOpenFiles(f"cannot open {path}: {error.strerror}") from error
        raise
