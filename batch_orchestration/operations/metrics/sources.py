"""Sources of the metrics in the data folder, read cheaply and without blocking others."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import msgspec

from batch_orchestration.core.errors import BatchNotFound, StorageError
from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.core.results import LATENCY_BOUNDS, BatchRecord
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.store import rows
from batch_orchestration.store.connection import reading
from batch_orchestration.workers.utilization import TimeBreakdown
from batch_orchestration.workers.utilization_files import accounts_path

logger = logging.getLogger(__name__)
#: Reading the store blocks commits: it is read at most this often, however often one scrapes.
STORE_SECONDS = 5.0
#: Longest wait for a locked store; Prometheus gives up after ten seconds.
LOCK_SECONDS = 1.0
#: Finished batches with their own series.
FINISHED_SHOWN = 5


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The store at one moment. Monotonic figures never fall, whatever is resumed or replayed.

    Attributes:
        batches_by_status: Number of batches.
        unfinished: Batches that are not final, oldest first.
        finished: The last few final batches, newest first.
        committed_chunks: Chunks that were ever committed; monotonic.
        completed: Answers that were ever committed, each request once; monotonic.
        attempts: Submissions of requests in those chunks.
        prompt_tokens: Of the answers, as `completion_tokens`; both monotonic.
        failures_by_code: Failures that were final at their commit; monotonic.
        dead_letters: Present number by code and state.
        latency_counts: Answers up to each of `LATENCY_BOUNDS`, then all of them; monotonic.
        latency_seconds: Sum of the latencies; monotonic.
    """

    batches_by_status: dict[str, int]
    unfinished: tuple[BatchRecord, ...]
    finished: tuple[BatchRecord, ...]
    committed_chunks: int
    completed: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    failures_by_code: dict[str, int]
    dead_letters: dict[tuple[str, str], int]
    latency_counts: tuple[int, ...]
    latency_seconds: float


_IS_FINAL = f"status IN ({', '.join(repr(str(status)) for status in sorted(FINAL))})"
#: The time at which a batch ended.
_ENDED = "coalesce(completed_at, cancelled_at, expired_at, failed_at, created_at)"
_BUCKETS = len(LATENCY_BOUNDS) + 1
#: The counts of a reverted commit stay in its row until the next commit replaces them, so these
#: sums never fall.
_CHUNKS = f"""
SELECT count(committed_at), coalesce(sum(completed), 0), coalesce(sum(attempts), 0),
    coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0),
    coalesce(sum(latency_micros), 0) / 1e6,
    {", ".join(f"coalesce(sum(latency_counts[{n}]), 0)::BIGINT" for n in range(1, _BUCKETS + 1))}
FROM chunks
"""
#: Rows are only added to this table. A closed replay has no code: it is no new failure.
_FAILURES = """
SELECT code, count(*) FROM dead_letter_events WHERE state = 'dead' AND code IS NOT NULL
GROUP BY code ORDER BY code
"""


def read_figures(path: Path, *, finished: int, deadline_seconds: float) -> StoreFigures:
    """Return the figures of a store; the cost grows with chunks, not with requests.

    Args:
        path: Of the store's file.
        finished: Number of finished batches to return.
        deadline_seconds: Longest wait for a locked store.

    Raises:
        StoreLocked: The store was locked past the deadline.
        StorageError: The store cannot be read, or has another schema.
    """
    with reading(path, deadline_seconds=deadline_seconds) as db:
        ((chunks, completed, attempts, prompt, completion, seconds, *latencies),) = db.execute(
            _CHUNKS
        ).fetchall()
        newest = f"WHERE {_IS_FINAL} ORDER BY {_ENDED} DESC LIMIT {int(finished)}"
        return StoreFigures(
            batches_by_status=_counts(db, "SELECT status, count(*) FROM batches GROUP BY status"),
            unfinished=_batches(db, f"WHERE NOT {_IS_FINAL} ORDER BY created_at, batch_id"),
            finished=_batches(db, newest),
            committed_chunks=chunks,
            completed=completed,
            attempts=attempts,
            prompt_tokens=prompt,
            completion_tokens=completion,
            failures_by_code=_counts(db, _FAILURES),
            dead_letters={
                (code, state): count
                for code, state, count in db.execute(
                    "SELECT code, state, count(*) FROM failed_requests GROUP BY code, state"
                ).fetchall()
            },
            latency_counts=tuple(latencies),
            latency_seconds=seconds,
        )


def _counts(db: duckdb.DuckDBPyConnection, sql: str) -> dict[str, int]:
    return dict(db.execute(sql).fetchall())


def _batches(db: duckdb.DuckDBPyConnection, rest: str) -> tuple[BatchRecord, ...]:
    return tuple(map(rows.batch_record, rows.select(db, "batches", rows.BATCHES, rest)))


class StoreSource:
    """The figures of the store, cached until the file changes.

    Args:
        path: Of the store; it is neither created nor changed.
        clock: Monotonic seconds.

    Attributes:
        figures: The last known ones; None before the first read.
        is_up: Whether they are current.
        read_at: Time of the last read.
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
        """Read the store if it has changed; if that fails, the known figures stay."""
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
        """Return a value that changes with each commit; None if there is no file."""
        try:
            states = [self._path.stat()]
        except OSError:
            return None
        with contextlib.suppress(OSError):
            # The log that a killed writer has left; DuckDB reads it with the file.
            states.append(self._path.with_name(f"{self._path.name}.wal").stat())
        return [(state.st_ino, state.st_mtime_ns, state.st_size) for state in states]


class AccountsSource:
    """The time breakdowns of all runs, by batch; an unchanged folder is not read again.

    A breakdown that was read is never dropped: its run's work is not undone when the batch's folder
    is removed.
    """

    def __init__(self, folder: DataFolder) -> None:
        self._folder = folder
        self._changed_at: dict[str, int] = {}
        self._accounts: dict[str, dict[str, TimeBreakdown]] = {}

    def refresh(self) -> None:
        """Read the breakdowns that have changed; of one that is damaged, the known values stay.

        Raises:
            StorageError: A damaged one was never read: without it, the totals would be too low.
        """
        problem = None
        for batch_id, changed_at in self._folders():
            if self._changed_at.get(batch_id) == changed_at:
                continue
            try:
                self._read(batch_id)
                self._changed_at[batch_id] = changed_at
            except StorageError as error:
                problem = error
        if problem is not None:
            raise problem

    def _read(self, batch_id: str) -> None:
        known, problem = self._accounts.setdefault(batch_id, {}), None
        for path in accounts_path(self._folder, batch_id).glob("*.json"):
            try:
                if (account := StateFile(path, TimeBreakdown).read()) is not None:
                    known[path.name] = account
            except StorageError as error:
                problem = problem if path.name in known else error
        if problem is not None:
            raise problem

    def of(self, batch_id: str) -> list[TimeBreakdown]:
        """Return the breakdowns of a batch."""
        return list(self._accounts.get(batch_id, {}).values())

    def all(self) -> Iterator[TimeBreakdown]:
        """Yield every breakdown."""
        for accounts in self._accounts.values():
            yield from accounts.values()

    def _folders(self) -> Iterator[tuple[str, int]]:
        try:
            batch_ids = [path.name for path in self._folder.batches.iterdir()]
        except OSError:
            return
        for batch_id in batch_ids:
            with contextlib.suppress(OSError, BatchNotFound):
                # A breakdown is written by a rename, which changes its folder.
                yield batch_id, accounts_path(self._folder, batch_id).stat().st_mtime_ns
