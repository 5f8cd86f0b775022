"""Alert states as files: that of `alert_sensor`, and that of the watchdog beside it."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.atomic import disk_errors, read_kept, write_atomically
from batch_orchestration.operations.alerts.state import AlertState


def write_alert_state(path: Path, state: AlertState) -> None:
    """Replace the state, durably.

    Raises:
        Shortage: There is no room; the old one stands.
        StorageError: It cannot be written; the old one stands.
    """
    write_atomically(path, msgspec.json.encode(state))


def read_alert_state(path: Path) -> AlertState | None:
    """Return the state; None if there is none yet.

    Raises:
        StorageError: It is damaged.
    """
    return read_kept(path, AlertState)


@contextlib.contextmanager
def alert_cycle(path: Path) -> Iterator[None]:
    """Keep others from running a cycle on the state.

    Raises:
        StorageError: Somebody else runs one, for example a tick that a person asked for in the UI.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    with disk_errors(path):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StorageError(f"{path} is in use by another tick") from None
    try:
        yield
    finally:
        lock.release()


def set_alert_state_aside(path: Path) -> None:
    """Put a damaged state out of the way, for people."""
    aside = path.with_name(f"{path.stem}.damaged-{int(time.time())}.json")
    with contextlib.suppress(FileNotFoundError), disk_errors(aside):
        path.replace(aside)


def touch_alert_state(path: Path) -> None:
    """Show the watchdog that a cycle has run though its state cannot be written; needs no room."""
    with contextlib.suppress(OSError):
        os.utime(path)


def last_cycle_at(path: Path) -> float | None:
    """Return the file's time, which each cycle changes; None if there is no file."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
