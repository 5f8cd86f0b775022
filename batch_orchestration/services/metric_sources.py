"""What metrics are made of, read from the data folder: cheaply, and in nobody's way."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from batch_orchestration.core.errors import BatchNotFound, StorageError
from batch_orchestration.domain.store_figures import StoreFigures
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.storage.store_figures import read_figures
from batch_orchestration.workers.utilization import RunAccount
from batch_orchestration.workers.utilization_files import accounts_path, read_accounts

logger = logging.getLogger(__name__)

#: While the store is read, commits wait: not more often than this, however often one scrapes.
STORE_SECONDS = 5.0
#: How long to wait for others to leave the store; Prometheus gives up after ten seconds.
LOCK_SECONDS = 1.0
#: Finished batches that have series of their own.
FINISHED_SHOWN = 5


class StoreSource:
    """The figures of the store, kept until the file changes.

    Args:
        path: Of the store; it is neither made nor changed.
        clock: Seconds that never go back.

    Attributes:
        figures: The last ones known; None before there were any.
        is_up: Whether they are those of now.
        read_at: POSIX seconds of the last reading.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._tried_at = -STORE_SECONDS
        self._seen: object = None
        self.figures: StoreFigures | None = None
        self.is_up = False
        self.read_at: float | None = None

    def refresh(self) -> None:
        """Read the store if it has changed; what is known stays if it cannot be read."""
        seen = self._state()
        if seen is None:
            self.is_up = False
        elif seen == self._seen:
            self.is_up = True
        elif self._clock() - self._tried_at >= STORE_SECONDS:
            self._tried_at = self._clock()
            self._read(seen)

    def _read(self, seen: object) -> None:
        try:
            self.figures = read_figures(
                self._path, finished=FINISHED_SHOWN, deadline_seconds=LOCK_SECONDS
            )
        except StorageError as error:
            if self.is_up:
                logger.warning("the figures of the store are the last known ones: %s", error)
            self.is_up = False
        else:
            self.is_up, self.read_at, self._seen = True, time.time(), seen

    def _state(self) -> object:
        """Return what changes with each commit; None if there is no file."""
        try:
            states = [self._path.stat()]
        except OSError:
            return None
        with contextlib.suppress(OSError):
            # What a writer that was killed has left; DuckDB reads it with the file.
            states.append(self._path.with_name(f"{self._path.name}.wal").stat())
        return [(state.st_ino, state.st_mtime_ns, state.st_size) for state in states]


class AccountsSource:
    """The accounts of all runs, by batch; of a folder that has not changed nothing is read anew.

    An account that was seen is not forgotten: what a run did is not undone when its batch's folder
    goes.
    """

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder
        self._changed_at: dict[str, int] = {}
        self._accounts: dict[str, dict[str, RunAccount]] = {}

    def refresh(self) -> None:
        """Read the accounts that have changed."""
        for batch_id, changed_at in self._folders():
            if self._changed_at.get(batch_id) != changed_at:
                self._changed_at[batch_id] = changed_at
                known = self._accounts.setdefault(batch_id, {})
                known.update((a.run_id, a) for a in read_accounts(self._folder, batch_id))

    def of(self, batch_id: str) -> list[RunAccount]:
        """Return the accounts of a batch."""
        return list(self._accounts.get(batch_id, {}).values())

    def all(self) -> Iterator[RunAccount]:
        """Yield every account."""
        for accounts in self._accounts.values():
            yield from accounts.values()

    def _folders(self) -> Iterator[tuple[str, int]]:
        try:
            batch_ids = [path.name for path in self._folder.batches.iterdir()]
        except OSError:
            return
        for batch_id in batch_ids:
            with contextlib.suppress(OSError, BatchNotFound):
                # An account is written by a rename, which changes its folder.
                yield batch_id, accounts_path(self._folder, batch_id).stat().st_mtime_ns
