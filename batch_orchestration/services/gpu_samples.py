"""Samples of GPUs on their way into the store, and out of it by age.

A batch's run takes them in beside its commits; what it left, because it was killed or the store was
locked, is taken in when the batch is delivered. Both only look on: nothing waits for them.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.files.atomic import disk_errors
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.storage.gpu_samples import GpuSampleTable
from batch_orchestration.storage.samples import sample_files
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)

#: So seldom a run opens the store for its samples: a chart may be a minute late.
TAKE_IN_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class PrunedSamples:
    """What was removed, or would be: rows of `gpu_samples`, and samples files with their bytes."""

    rows: int
    files: int
    file_bytes: int


class SampleTaker:
    """Takes samples into the store, now and then, and never raises.

    Args:
        folder: The data folder.
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
        """Take in what is new of a batch, unless that was tried a moment ago."""
        if self._clock() - self._tried_at >= TAKE_IN_SECONDS:
            self._tried_at = self._clock()
            self.take_in(batch_id)

    def take_in(self, batch_id: str) -> None:
        """Take in what is new of a batch."""
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
    """Remove samples older than that, of batches that have ended: rows of the store, and files.

    Those of any other batch stay whole, for its report is still to be drawn from them.

    Args:
        folder: The data folder.
        store: The store.
        now: POSIX seconds.
        keep_seconds: How old samples may become.
        ended: The batches that are meant; default: all that have ended.
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
