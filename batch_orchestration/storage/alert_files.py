"""Books of alerts as files: that of `alert_sensor`, and that of the watchdog beside it."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from batch_orchestration.domain.alert_book import AlertBook
from batch_orchestration.domain.errors import StorageError
from batch_orchestration.storage.files import disk_errors, read_kept, write_atomically


def write_book(path: Path, book: AlertBook) -> None:
    """Replace the book, durably.

    Raises:
        Shortage: There is no room; the old one stands.
        StorageError: It cannot be written; the old one stands.
    """
    write_atomically(path, msgspec.json.encode(book))


def read_book(path: Path) -> AlertBook | None:
    """Return the book; None if there is none yet.

    Raises:
        StorageError: It is damaged.
    """
    return read_kept(path, AlertBook)


@contextlib.contextmanager
def tending(path: Path) -> Iterator[None]:
    """Be the only one who tends a book.

    Raises:
        StorageError: Somebody else does, for example a tick that a person asked for in the UI.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    with disk_errors(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StorageError(f"{path} is being tended by another tick") from None
    try:
        yield
    finally:
        lock.release()


def set_book_aside(path: Path) -> None:
    """Put a damaged book out of the way, for people."""
    aside = path.with_name(f"{path.stem}.damaged-{int(time.time())}.json")
    with contextlib.suppress(FileNotFoundError), disk_errors(aside):
        path.replace(aside)


def touch_book(path: Path) -> None:
    """Show the watchdog that the book is tended though it cannot be written; needs no room."""
    with contextlib.suppress(OSError):
        os.utime(path)


def last_tended(path: Path) -> float | None:
    """Return the book's time, which each look changes; None if there is no book."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
