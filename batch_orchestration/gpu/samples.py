"""A sample: the state of a run, its engine and its GPUs at one moment."""

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.run_load import RunLoad

#: A time within the calendar; a sample with any other is invalid, and no page could show it.
Moment = Annotated[float, msgspec.Meta(ge=0, lt=253_402_300_800)]


class RunSample(RunLoad, kw_only=True):
    """The load of a run, as kept for its report.

    Attributes:
        at: Before the year 10000.
        batch_id: The run's primary batch; None before the run has begun one.
    """

    at: Moment
    run_id: str
    batch_id: str | None = None


logger = logging.getLogger(__name__)
#: Maximum of samples read of a batch, however long it took; eight for each point of a plot.
MOST_READ = 1_000
_decode = msgspec.json.Decoder(RunSample).decode


def samples_folder(folder: DataFolder, batch_id: str) -> Path:
    """Return the folder of a batch's samples, one file per run."""
    return folder.plan_path(batch_id).parent / "samples"


def append_sample(folder: DataFolder, batch_id: str, sample: RunSample) -> None:
    """Append a sample to its run's file.

    Not fsynced: a power loss costs a few seconds of a plot.

    Raises:
        OSError: It cannot be written.
    """
    path = samples_folder(folder, batch_id) / f"{sample.run_id}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(sample) + b"\n")


def read_samples(
    folder: DataFolder, batch_id: str, *, until: float = math.inf, most: int = MOST_READ
) -> list[RunSample]:
    """Return the samples of all runs of a batch, ordered by time; empty if there are none.

    If there are more than `most`, only every n-th is returned: a week takes no more memory than an
    hour. The first and last sample of each run and the first after each restart of its engine are
    always returned. Torn or damaged lines and unreadable files are skipped.

    Args:
        until: Later samples are skipped.
        most: Maximum number of samples beside those that are always returned.
    """
    telling, others = list[RunSample](), _EveryNth(most)
    for path in sample_files(folder, batch_id):
        before: RunSample | None = None
        for sample in decode_samples(_lines_of(path)):
            if sample.at > until:
                continue
            if before is None or sample.restarts != before.restarts:
                telling.append(sample)
            elif before is not telling[-1]:
                others.add(before)
            before = sample
        if before is not None and before is not telling[-1]:
            telling.append(before)
    return sorted([*telling, *others.kept], key=lambda sample: sample.at)


class _EveryNth:
    """Keeps every n-th added sample; n doubles whenever too many are kept."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._step = 1
        self._added = 0
        self.kept: list[RunSample] = []

    def add(self, sample: RunSample) -> None:
        if self._added % self._step == 0:
            self.kept.append(sample)
        self._added += 1
        if len(self.kept) > self._most:
            self.kept, self._step = self.kept[::2], 2 * self._step


def sample_files(folder: DataFolder, batch_id: str) -> list[Path]:
    """Return the samples files of a batch, each named after its run."""
    return sorted(samples_folder(folder, batch_id).glob("*.jsonl"))


def decode_samples(lines: Iterable[bytes]) -> Iterator[RunSample]:
    """Yield the samples in these lines; invalid lines are skipped."""
    for line in lines:
        try:
            yield _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue


def _lines_of(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        logger.warning("the samples in %s cannot be read: %s", path, error)
