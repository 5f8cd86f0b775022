"""Files of the data folder about its health: the last report, and what runs say of themselves."""

import math
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from batch_orchestration.domain.health import HealthReport
from batch_orchestration.domain.heartbeats import Heartbeat
from batch_orchestration.storage.files import DataFolder, read_kept, write_atomically
from batch_orchestration.storage.heartbeat_files import heartbeat_paths, read_pulse


def write_health(folder: DataFolder, report: HealthReport) -> None:
    """Keep the report that everyone reads."""
    write_atomically(folder.health, msgspec.json.encode(report))


def read_health(folder: DataFolder) -> HealthReport | None:
    """Return the report as it was last written; None if it never was.

    Raises:
        StorageError: It is damaged.
    """
    return read_kept(folder.health, HealthReport)


@dataclass(frozen=True)
class Heartbeats:
    """The heartbeats of all runs.

    Attributes:
        damaged: What is wrong with the files that cannot be read, by run id.
    """

    beats: tuple[Heartbeat, ...]
    damaged: dict[str, str]


def read_heartbeats(folder: DataFolder) -> Heartbeats:
    """Return the heartbeats that lie there, those of runs that are gone included."""
    beats, damaged = [], {}
    for path in heartbeat_paths(folder):
        try:
            pulse = read_pulse(path)
        except OSError as error:
            damaged[path.stem] = f"cannot read {path}: {error.strerror or error}"
            continue
        if pulse is None:  # its run has just ended
            continue
        if pulse.heartbeat is None:
            damaged[path.stem] = f"{path} says nothing that can be read"
        elif pulse.told is None:
            # Heard, and no room to say more: how far its work is, nobody knows.
            beats.append(replace(pulse.heartbeat, at=pulse.at, patience_seconds=math.inf))
        else:
            beats.append(replace(pulse.heartbeat, at=pulse.at))
    return Heartbeats(tuple(beats), damaged)
