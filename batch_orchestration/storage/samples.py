"""Samples files: a line per moment of a run, in the folder of the batch that it works on.

They are written beside the run and read by whoever draws or counts; the store has what they say of
GPUs as the table `gpu_samples`.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from batch_orchestration.domain.samples import RunSample
from batch_orchestration.files.data_folder import DataFolder

logger = logging.getLogger(__name__)

#: Samples that are read of a batch, however long it took; eight for each point of a plot.
MOST_READ = 1_000

_decode = msgspec.json.Decoder(RunSample).decode


def samples_folder(folder: DataFolder, batch_id: str) -> Path:
    """Where the samples of a batch are kept, a file per run."""
    return folder.plan_path(batch_id).parent / "samples"


def append_sample(folder: DataFolder, batch_id: str, sample: RunSample) -> None:
    """Add a sample to its run's file.

    Not fsynced: what a power loss takes is a few seconds of a plot.

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
    """Return the samples of all runs of a batch in the order of time; empty if there are none.

    Of more than `most` only every n-th: a week takes no more memory than an hour. Always there are
    the first and the last of each run, and the first after each restart of its engine. A line that
    is torn or damaged is left out, and so is a file that cannot be read.

    Args:
        folder: The data folder.
        batch_id: Of the batch.
        until: Later samples are left out.
        most: How many there are at most, beside those that are always there.
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
    """Keeps every n-th of what is added; n doubles whenever these become too many."""

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
    """Return the samples files of a batch; the name of each is that of its run."""
    return sorted(samples_folder(folder, batch_id).glob("*.jsonl"))


def decode_samples(lines: Iterable[bytes]) -> Iterator[RunSample]:
    """Yield the samples of these lines; what is no sample is left out."""
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
