"""Surveys: what was found in a dropped file that had to go back to the inbox for want of room.

So that later ticks know its numbers without reading it, and its place in the queue, which is that
of its first arrival. Kept by what tells a file from every other, and changes when it is written to.
"""

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import FileDamaged
from batch_orchestration.files.atomic import read_kept, write_atomically
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.capacity import Demand, Obstacle
from batch_orchestration.queue.entries import WaitReason


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What was found in a file.

    Attributes:
        requests: Non-blank lines, faulty ones included.
        tokens: Expected, prompt and answer together.
        size_bytes: Uncompressed.
        arrived_at: In the inbox for the first time, POSIX seconds.
        surveyed_at: POSIX seconds.
        reason: Why it went back; the same as a sentence in `detail`.
    """

    requests: int
    tokens: int
    size_bytes: int
    arrived_at: float
    surveyed_at: float
    reason: WaitReason
    detail: str


def keep_survey(
    folder: DataFolder,
    file: Path,
    plan: BatchPlan,
    demand: Demand,
    obstacle: Obstacle,
    *,
    at: float,
) -> None:
    """Keep what was found in a file that has to go back; `at` in POSIX seconds."""
    survey = Survey(
        requests=plan.requests,
        tokens=demand.tokens or 0,
        size_bytes=plan.size_bytes,
        arrived_at=plan.arrived_at or at,
        surveyed_at=at,
        reason=obstacle.reason,
        detail=obstacle.detail,
    )
    Surveys(folder).keep(file.lstat(), survey)


class Surveys:
    """The surveys of a data folder."""

    def __init__(self, folder: DataFolder) -> None:
        self._path = folder.surveys

    @property
    def empty(self) -> bool:
        """Whether there is none."""
        with contextlib.suppress(FileNotFoundError):
            return not any(self._path.iterdir())
        return True

    def find(self, stats: os.stat_result) -> Survey | None:
        """Return the survey of a file, if it was read before and has not changed since."""
        with contextlib.suppress(FileDamaged):  # the file is read once more
            return read_kept(self._file(stats), Survey)
        return None

    def keep(self, stats: os.stat_result, survey: Survey) -> None:
        """Keep the survey of a file, durably."""
        write_atomically(self._file(stats), msgspec.json.encode(survey))

    def forget_others(self, files: Collection[os.stat_result]) -> None:
        """Remove the surveys of all but these files: the others are batches, or gone."""
        kept = {self._file(stats).name for stats in files}
        with contextlib.suppress(FileNotFoundError), os.scandir(self._path) as entries:
            for entry in entries:
                if entry.name not in kept and not entry.name.startswith("."):
                    with contextlib.suppress(OSError):  # a folder, say: it does no harm
                        Path(entry.path).unlink(missing_ok=True)

    def _file(self, stats: os.stat_result) -> Path:
        # Renaming keeps all three, and writing moves the last.
        key = f"{stats.st_ino:x}-{stats.st_size:x}-{stats.st_mtime_ns:x}"
        return self._path / f"{key}.json"
