"""Heartbeats as files: one per run, replaced every few seconds, gone when its worker ended well.

Never synced: they tell of this moment, and must not wait for the disk behind a commit.
"""

import os
import time
from pathlib import Path

import msgspec

from batch_orchestration.domain.heartbeats import Heartbeat, Pulse
from batch_orchestration.storage.files import DataFolder


def write_heartbeat(path: Path, heartbeat: Heartbeat) -> None:
    """Replace a run's heartbeat; where there is no room for it, let it at least be heard.

    Raises:
        OSError: Not even the time of the file can be set.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(msgspec.json.encode(heartbeat))
        part.replace(path)
    except OSError:
        # Takes no room where the file exists, and hardly any where it does not.
        path.touch()
        os.utime(path, (time.time(), time.time()))


def read_pulse(path: Path) -> Pulse | None:
    """Return what lies there of a run's heartbeats; None if nothing.

    Raises:
        OSError: It cannot be read.
    """
    try:
        data, changed_at = path.read_bytes(), path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        heartbeat = msgspec.json.decode(data, type=Heartbeat)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Pulse(at=changed_at)
    return Pulse(at=max(heartbeat.at, changed_at), heartbeat=heartbeat)


def remove_heartbeat(path: Path) -> None:
    """Remove a run's heartbeat, with what a killed writer may have left beside it."""
    path.unlink(missing_ok=True)
    path.with_name(f".{path.name}.part").unlink(missing_ok=True)


def heartbeat_paths(folder: DataFolder) -> list[Path]:
    """Return the heartbeats of all runs, those of dead ones included, by run id."""
    return sorted(folder.heartbeats.glob("*.json"))
