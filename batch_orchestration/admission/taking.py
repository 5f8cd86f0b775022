"""Taking a dropped file: afterwards it is ours alone, or it stays in place with a reason.

A file that we own is renamed. A file of another owner is copied, because the owner could change it
later, even through a descriptor that is already open. A file on another disk is copied, too.
"""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from batch_orchestration.files.atomic import sync_folder
from batch_orchestration.files.moving import move_if_free, move_into

_BLOCK_BYTES = 2**20
LINK_PUT_THERE = "it is no file any more: a link or a pipe was put in its place"


class NotTaken(Exception):
    """A file stays in place; the message is the reason, for people."""


def take(source: Path, target: Path) -> None:
    """Move a dropped file to `target`, a free name, durably; afterwards we own it.

    A crash in the middle can leave it in both places, never in none.

    Raises:
        NotTaken: The file stays in place.
    """
    with _reasons(source):
        stats = source.lstat()
        if not stat.S_ISREG(stats.st_mode):
            raise NotTaken(LINK_PUT_THERE)
        _check_removable(source, stats)
        if stats.st_uid == os.geteuid() and _renamed(source, target):
            return
        if not os.access(source, os.R_OK):
            raise NotTaken(f"it may not be read; chmod g+r {source}")
        _copy(source, target)
        try:
            _remove(source, stats)
        except BaseException:
            target.unlink()
            raise


def _check_removable(source: Path, stats: os.stat_result) -> None:
    """Check, before a file is copied, that it can be removed afterwards."""
    folder, user = source.parent.stat(), os.geteuid()
    if not os.access(source.parent, os.W_OK | os.X_OK):
        raise NotTaken(
            f"it cannot be taken out of {source.parent}, where only others may write;"
            f" chmod g+ws {source.parent}"
        )
    if folder.st_mode & stat.S_ISVTX and user not in (0, stats.st_uid, folder.st_uid):
        raise NotTaken(
            f"it cannot be taken out of {source.parent}, which is sticky: only its owner may;"
            f" chmod -t {source.parent}"
        )


def _renamed(source: Path, target: Path) -> bool:
    """Rename a file of ours; return whether that was possible."""
    try:
        source.rename(target)
    except OSError:  # mostly another disk; if copying fails too, its error is reported
        return False
    if not stat.S_ISREG(target.lstat().st_mode):
        move_into(target, source.parent, source.name)
        raise NotTaken(LINK_PUT_THERE)
    sync_folder(target.parent)
    sync_folder(source.parent)
    return True


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        with _opened(source) as original, part.open("xb") as copy:
            before = os.fstat(original.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise NotTaken(LINK_PUT_THERE)
            shutil.copyfileobj(original, copy, _BLOCK_BYTES)
            copy.flush()
            os.fsync(copy.fileno())
            if _state(os.fstat(original.fileno())) != _state(before):
                raise NotTaken("it changed while it was copied")
        part.rename(target)
        sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


def _opened(source: Path) -> BinaryIO:
    """Open a file without following a link or waiting for a pipe in its place."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.fdopen(os.open(source, flags), "rb")


def _remove(source: Path, taken: os.stat_result) -> None:
    """Remove the file that was copied, but no other file that has taken its name since."""
    aside = source.with_name(f".{secrets.token_hex(6)}.tmp")  # the inbox ignores a leading dot
    source.rename(aside)
    if _state(aside.lstat(), renamed=True) == _state(taken, renamed=True):
        aside.unlink()
        sync_folder(source.parent)
        return
    if not move_if_free(aside, source):
        move_into(aside, source.parent, source.name)
    raise NotTaken("it was exchanged or changed while it was copied")


def _state(stats: os.stat_result, *, renamed: bool = False) -> tuple[int, ...]:
    """Return the attributes that change with a write; a rename changes ctime, too."""
    content = (stats.st_dev, stats.st_ino, stats.st_size, stats.st_mtime_ns)
    return content if renamed else (*content, stats.st_ctime_ns)


@contextlib.contextmanager
def _reasons(source: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotTaken("it was taken away meanwhile") from error
    except OSError as error:
        raise NotTaken(f"it cannot be taken: {error.strerror or error}") from error
