"""Files of the data folder about its health: the last report, and what runs say of themselves."""

from dataclasses import dataclass

import msgspec

from batch_orchestration.domain.errors import StorageError
from batch_orchestration.domain.health import HealthReport
from batch_orchestration.domain.heartbeats import Heartbeat
from batch_orchestration.storage.files import DataFolder, read_kept, write_atomically


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
    for path in sorted((folder.root / "heartbeats").glob("*.json")):
        try:
            beat = read_kept(path, Heartbeat)
        except StorageError as error:
            damaged[path.stem] = str(error)
            continue
        if beat is not None:  # else its run has just ended
            beats.append(beat)
    return Heartbeats(tuple(beats), damaged)
