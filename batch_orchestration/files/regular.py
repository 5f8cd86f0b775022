"""Opening files of ours: regular ones, and nothing that only stands in their place."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from batch_orchestration.core.errors import FileDamaged, TooManyOpenFiles

#: The limit of this process, or of the machine: no file is to blame.
NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})


def read_regular(path: Path) -> bytes:
    """Return what a file holds, as `Path.read_bytes` does, but never wait at a pipe.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        # Not by `fdopen`: of a folder that neither closes the descriptor nor names the path.
        os.close(descriptor)
        raise OSError(errno.EINVAL, _what_it_is(mode), str(path))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. It never waits: who opens a pipe would, for somebody who writes.

    Raises:
        FileNotFoundError: Nothing is there.
        FileDamaged: A folder, a pipe or a link that leads nowhere is, or it cannot be opened.
        TooManyOpenFiles: It cannot be opened just now.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if path.is_symlink():
            raise FileDamaged(path, "is a link that leads nowhere") from None
        raise
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise TooManyOpenFiles(f"cannot open {path}: {error.strerror}") from error
        raise FileDamaged(path, f"cannot be read: {error.strerror or error}") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise FileDamaged(path, _what_it_is(mode))
    return os.fdopen(descriptor, "rb")


def _what_it_is(mode: int) -> str:
    return "is a folder" if stat.S_ISDIR(mode) else "is no regular file"
