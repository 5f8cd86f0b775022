"""The book of alerts as a file of the data folder."""

import contextlib
import time

import msgspec

from batch_orchestration.domain.alert_book import AlertBook
from batch_orchestration.storage.files import DataFolder, disk_errors, read_kept, write_atomically


def write_book(folder: DataFolder, book: AlertBook) -> None:
    """Replace the book, durably.

    Raises:
        DiskFull: There is no room; the old one stands.
        StorageError: It cannot be written; the old one stands.
    """
    write_atomically(folder.alerts, msgspec.json.encode(book))


def read_book(folder: DataFolder) -> AlertBook | None:
    """Return the book; None if there is none yet.

    Raises:
        StorageError: It is damaged.
    """
    return read_kept(folder.alerts, AlertBook)


def set_book_aside(folder: DataFolder) -> None:
    """Put a damaged book out of the way, for people."""
    aside = folder.alerts.with_name(f"alerts.damaged-{int(time.time())}.json")
    with contextlib.suppress(FileNotFoundError), disk_errors(aside):
        folder.alerts.replace(aside)
