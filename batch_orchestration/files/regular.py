"""Opening our own files: regular files only, never a pipe, folder or broken link in their place."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from batch_orchestration.core.errors import FileDamaged, TooManyOpenFiles

#: The process or the machine has reached its limit on descriptors; the file is not at fault.
NO_DESCRIPTOR = frozenset({errno.EMFILE, errno.ENFILE})


def read_regular(path: Path) -> bytes:
    """Return the content of a file, like `Path.read_bytes`, but never block on a pipe.

    Raises:
        OSError: The file cannot be read or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        # For a folder, `fdopen` neither closes the descriptor nor includes the path in its error.
        os.close(descriptor)
        raise OSError(errno.EINVAL, _what_it_is(mode), str(path))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, without blocking as a plain `open` of a pipe without writers would.

    Raises:
        FileNotFoundError: The path does not exist.
        FileDamaged: The path is a folder, a pipe or a broken link, or cannot be opened.
        TooManyOpenFiles: No descriptor is left; retry later.
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
