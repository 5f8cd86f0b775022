"""Samples files: a line per moment of a run, in the folder of the batch that it works on.

They are written beside the run and read by whoever draws or counts; the store has what they say of
GPUs as the table `gpu_samples`.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec

from batch_orchestration.domain.samples import RunSample
from batch_orchestration.storage.files import DataFolder

logger = logging.getLogger(__name__)

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


def read_samples(folder: DataFolder, batch_id: str) -> list[RunSample]:
    """Return the samples of all runs of a batch in the order of time; empty if there are none.

    A line that is torn or damaged is left out, and so is a file that cannot be read.
    """
    found = [
        sample
        for path in sample_files(folder, batch_id)
        for sample in decode_samples(_bytes_of(path))
    ]
    return sorted(found, key=lambda sample: sample.at)


def sample_files(folder: DataFolder, batch_id: str) -> list[Path]:
    """Return the samples files of a batch; the name of each is that of its run."""
    return sorted(samples_folder(folder, batch_id).glob("*.jsonl"))


def decode_samples(data: bytes) -> Iterator[RunSample]:
    """Yield the samples of these lines; what is no sample is left out."""
    for line in data.splitlines():
        try:
            yield _decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        logger.warning("the samples in %s cannot be read: %s", path, error)
        return b""
