"""Alert state files: that of `alert_sensor`, and that of the watchdog beside it."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.atomic import disk_errors, write_atomically
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.alerts.state import AlertState


def write_alert_state(path: Path, state: AlertState) -> None:
    """Replace the state durably.

    Raises:
        Shortage: Space or descriptors have run out; the old state stays.
        StorageError: The state cannot be written; the old one stays.
    """
    write_atomically(path, msgspec.json.encode(state))


def read_alert_state(path: Path) -> AlertState | None:
    """Return the state; None if there is none yet.

    Raises:
        StorageError: The state is damaged.
    """
    return StateFile(path, AlertState).read()


@contextlib.contextmanager
def alert_cycle(path: Path) -> Iterator[None]:
    """Hold the state's lock during one cycle.

    Raises:
        StorageError: Another cycle is running, for example a tick requested in the UI.
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
    """Rename a damaged state, so that a person can look at it."""
    aside = path.with_name(f"{path.stem}.damaged-{int(time.time())}.json")
    with contextlib.suppress(FileNotFoundError), disk_errors(aside):
        path.replace(aside)


def touch_alert_state(path: Path) -> None:
    """Show the watchdog that a cycle has run although its state cannot be written.

    Works on a full disk.
    """
    with contextlib.suppress(OSError):
        os.utime(path)


def last_cycle_at(path: Path) -> float | None:
    """Return the file's modification time, which each cycle changes; None if there is no file."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
