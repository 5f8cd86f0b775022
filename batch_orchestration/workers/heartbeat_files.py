"""Heartbeat files: one per run, replaced every few seconds, removed at the normal end of a worker.

Never fsynced: they describe the present, and must not wait for the disk behind a commit.
"""

import contextlib
import os
import time
from pathlib import Path

import msgspec

from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.regular import read_regular
from batch_orchestration.workers.heartbeat import Heartbeat, LastHeartbeat

#: Files are padded to multiples of this, so that they can be overwritten on a full disk.
BLOCK_BYTES = 4096


def write_heartbeat(path: Path, heartbeat: Heartbeat) -> None:
    """Replace a run's heartbeat; on a full disk, overwrite the existing one.

    Raises:
        OSError: Neither is possible.
    """
    data = msgspec.json.encode(heartbeat)
    data = data.ljust(-(-len(data) // BLOCK_BYTES) * BLOCK_BYTES)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        with path.open("r+b", buffering=0) as file:
            file.write(data.ljust(os.fstat(file.fileno()).st_size))
    _mark(path).unlink(missing_ok=True)


def touch_heartbeat(path: Path) -> None:
    """Record that a worker lives although its heartbeat cannot be written.

    Raises:
        OSError: Not even that is possible.
    """
    # Takes no space if the files exist, and hardly any if they do not.
    path.touch()
    _mark(path).touch()
    os.utime(_mark(path), (time.time(), time.time()))


def read_last_heartbeat(path: Path) -> LastHeartbeat | None:
    """Return the latest heartbeat of a run; None if there is none.

    Raises:
        OSError: It cannot be read.
    """
    try:
        data, at = read_regular(path), path.stat().st_mtime
    except FileNotFoundError:
        return None
    heartbeat: Heartbeat | None = None
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        heartbeat = msgspec.json.decode(data, type=Heartbeat)
        # Not the time of the file: a file server may have another clock.
        at = heartbeat.at
    try:
        return LastHeartbeat(at=_mark(path).stat().st_mtime, heartbeat=heartbeat, outdated=True)
    except FileNotFoundError:
        return LastHeartbeat(at=at, heartbeat=heartbeat)


def read_last_heartbeats(folder: DataFolder) -> dict[str, LastHeartbeat]:
    """Return the latest heartbeats of all runs by run id; unreadable ones are left out.

    Raises:
        OSError: This process can read no file at all now.
    """
    found, faults = {}, Faults()  # `operations.health.damage` reports them
    for path in heartbeat_paths(folder):
        with faults.of(path.stem):
            if (last_heartbeat := read_last_heartbeat(path)) is not None:
                found[path.stem] = last_heartbeat
    return found


def remove_heartbeat(path: Path) -> None:
    """Remove a run's heartbeat, and the remains of a killed writer beside it."""
    path.unlink(missing_ok=True)
    path.with_name(f".{path.name}.part").unlink(missing_ok=True)
    _mark(path).unlink(missing_ok=True)


def heartbeat_paths(folder: DataFolder) -> list[Path]:
    """Return the heartbeat files of all runs, including dead ones, by run id."""
    return sorted(folder.heartbeats.glob("*.json"))


def _mark(path: Path) -> Path:
    """Return the marker file: if it exists, the heartbeat is outdated and its worker lives."""
    return path.with_suffix(".heard")
