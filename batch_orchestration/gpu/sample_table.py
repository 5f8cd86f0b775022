"""The table `gpu_samples`: facts of GPUs from the samples files, for queries."""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb
import msgspec

from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.files.atomic import disk_errors
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.samples import RunSample, decode_samples, sample_files
from batch_orchestration.store import rows
from batch_orchestration.store.store import Store

#: Read from a file at a time, which bounds how long the store is locked for others.
MOST_BYTES = 4 * 2**20
_OF_FILE = "WHERE batch_id = ? AND run_id = ?"


class GpuSampleTable:
    """The part of the store about GPUs. Methods raise the same errors as those of `Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def take_in(self, batch_id: str, files: Sequence[Path]) -> bool:
        """Add the new lines of a batch's samples files; return whether more are left.

        The same transaction stores how far each file was read. However often and by however many
        processes this is called, the table has each (run, moment, device) once.
        """
        with self._store.writing() as db:
            more = [_take_in(db, batch_id, path) for path in files]
        return any(more)

    def prune(self, before: float, *, spare: Sequence[str], dry_run: bool = False) -> int:
        """Remove rows from before a time, except for the batches to be spared.

        Returns:
            The number of such rows, also of a dry run.
        """
        where = "WHERE sampled_at < ? AND NOT list_contains(?, batch_id)"
        values = [rows.timestamp(before), list(spare)]
        with self._store.writing() as db:
            old = len(rows.select(db, "gpu_samples", ["1"], where, values))
            if old and not dry_run:
                db.execute(f"DELETE FROM gpu_samples {where}", values)
        return old


def _take_in(db: duckdb.DuckDBPyConnection, batch_id: str, path: Path) -> bool:
    of_file = [batch_id, path.stem]
    known = rows.select(db, "gpu_sample_files", ["bytes"], _OF_FILE, of_file)
    data, reached, more = _whole_lines(path, known[0]["bytes"] if known else 0)
    if not data:
        return False
    samples = [sample for sample in decode_samples(data.splitlines()) if sample.gpus]
    found = [row for sample in samples for row in _rows(batch_id, sample)]
    if found:
        # Rows of these moments come from the same lines, read before the file was replaced or the
        # store lost its offset. Only exact moments are deleted, not a range: a clock that is set
        # back repeats times.
        moments = list({rows.timestamp(row["sampled_at"]) for row in found})
        db.execute(
            f"DELETE FROM gpu_samples {_OF_FILE} AND sampled_at IN (SELECT unnest(?::TIMESTAMP[]))",
            [*of_file, moments],
        )
        rows.insert(db, "gpu_samples", found)
    db.execute(f"DELETE FROM gpu_sample_files {_OF_FILE}", of_file)
    db.execute("INSERT INTO gpu_sample_files VALUES (?, ?, ?)", [*of_file, reached])
    return more


def _whole_lines(path: Path, offset: int) -> tuple[bytes, int, bool]:
    """Return whole lines from an offset, the offset behind them, and whether more may follow."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < offset:
            offset = 0
        file.seek(offset)
        data = file.read(MOST_BYTES)
    more = len(data) == MOST_BYTES
    whole = data[: data.rfind(b"\n") + 1]
    if more and not whole:
        whole = data  # No valid line is that long: it is damaged, and skipped.
    return whole, offset + len(whole), more


def _rows(batch_id: str, sample: RunSample) -> Iterator[rows.Row]:
    for device in sample.gpus:
        reasons = device.throttle_reasons
        yield msgspec.structs.asdict(device) | {
            "run_id": sample.run_id,
            "batch_id": batch_id,
            "sampled_at": sample.at,
            "gpu": device.uuid,
            "gpu_index": device.index,
            "throttle_reasons": None if reasons is None else ",".join(reasons),
            "in_flight": sample.in_flight,
            "window_requests": sample.window,
            "output_tokens_per_second": sample.output_tokens_per_second,
        }


logger = logging.getLogger(__name__)
#: Between a run's accesses to the store for its samples: a chart may be a minute late.
TAKE_IN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class PrunedSamples:
    """Samples removed, or to be removed: rows of `gpu_samples`, and files with their bytes."""

    rows: int
    files: int
    file_bytes: int


class SampleTaker:
    """Copies samples into the store now and then. Never raises.

    Args:
        store: With a short deadline: a locked store is tried again a minute later.
        clock: Monotonic seconds.
    """

    def __init__(
        self, *, folder: DataFolder, store: Store, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._store = store
        self._clock = clock
        self._tried_at = float("-inf")
        self._complained = False

    def after_commit(self, batch_id: str) -> None:
        """Add the new samples of a batch, at most once in `TAKE_IN_SECONDS`."""
        if self._clock() - self._tried_at >= TAKE_IN_SECONDS:
            self._tried_at = self._clock()
            self.take_in(batch_id)

    def take_in(self, batch_id: str) -> None:
        """Add the new samples of a batch."""
        try:
            if files := sample_files(self._folder, batch_id):
                while GpuSampleTable(self._store).take_in(batch_id, files):
                    pass
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not worth a commit
            if not self._complained:
                self._complained = True
                logger.warning("samples of %s are not in the store yet: %s", batch_id, error)


def prune_samples(
    folder: DataFolder,
    store: Store,
    now: float,
    keep_seconds: float,
    *,
    ended: Collection[str] | None = None,
    dry_run: bool = False,
) -> PrunedSamples:
    """Remove samples older than `keep_seconds` of batches that have ended: rows and files.

    Samples of other batches stay complete, since their reports are still to be drawn.

    Args:
        ended: The batches to consider; by default all that have ended.
        dry_run: Only count.

    Raises:
        StorageError: The store cannot be used, or a file cannot be removed.
    """
    before = now - keep_seconds
    records = store.batches()
    final = {record.batch_id for record in records if record.status in FINAL}
    meant = final if ended is None else final.intersection(ended)
    spared = [record.batch_id for record in records if record.batch_id not in meant]
    old = [
        (path, path.stat().st_size)
        for batch_id in sorted(meant)
        for path in sample_files(folder, batch_id)
        if path.stat().st_mtime < before
    ]
    rows = GpuSampleTable(store).prune(before, spare=spared, dry_run=dry_run)
    if not dry_run:
        for path, _ in old:
            with disk_errors(path):
                path.unlink(missing_ok=True)
    return PrunedSamples(rows=rows, files=len(old), file_bytes=sum(size for _, size in old))
