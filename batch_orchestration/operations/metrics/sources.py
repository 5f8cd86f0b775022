"""What metrics are made of, read from the data folder: cheaply, and in nobody's way."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import msgspec

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import BatchNotFound, StorageError
from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.core.results import LATENCY_BOUNDS
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store import rows
from batch_orchestration.store.connection import reading
from batch_orchestration.workers.utilization import TimeBreakdown
from batch_orchestration.workers.utilization_files import accounts_path, read_accounts


class BatchFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the store has of one batch; outcomes are those of committed chunks.

    Attributes:
        created_at: POSIX seconds.
    """

    batch_id: str
    status: BatchStatus
    created_at: float
    total: int
    completed: int
    failed: int

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status in FINAL


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The store at one moment. What is marked so never falls, whatever is resumed or replayed.

    Attributes:
        batches_by_status: How many batches are in each.
        unfinished: Batches that are not final, oldest first.
        finished: The last few that are, newest first.
        committed_chunks: Chunks that ever were committed; never falls.
        completed: Answers that ever were committed, each request once; never falls.
        attempts: Submissions of requests in those chunks.
        prompt_tokens: Of the answers, as `completion_tokens`; neither falls.
        failures_by_code: Every failure that was final when it was committed; never falls.
        dead_letters: By code and state, now.
        latency_counts: Answers that took at most so long, by `LATENCY_BOUNDS`, then all of them;
            never fall.
        latency_seconds: Their sum; never falls.
    """

    batches_by_status: dict[str, int]
    unfinished: tuple[BatchFigures, ...]
    finished: tuple[BatchFigures, ...]
    committed_chunks: int
    completed: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    failures_by_code: dict[str, int]
    dead_letters: dict[tuple[str, str], int]
    latency_counts: tuple[int, ...]
    latency_seconds: float


_BATCH = ("batch_id", "status", "created_at", "requests", "completed", "failed")
_IS_FINAL = f"status IN ({', '.join(repr(str(status)) for status in sorted(FINAL))})"
#: When a batch came to its end.
_ENDED = "coalesce(completed_at, cancelled_at, expired_at, failed_at, created_at)"
_BUCKETS = len(LATENCY_BOUNDS) + 1
#: What a commit that was taken back had counted stays in its row until the next one replaces it, so
#: that these sums never fall.
_CHUNKS = f"""
SELECT count(committed_at), coalesce(sum(completed), 0), coalesce(sum(attempts), 0),
    coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0),
    coalesce(sum(latency_micros), 0) / 1e6,
    {", ".join(f"coalesce(sum(latency_counts[{n}]), 0)::BIGINT" for n in range(1, _BUCKETS + 1))}
FROM chunks
"""
#: Rows are only added to this table. A replay that was closed has no code: that is no new failure.
_FAILURES = """
SELECT code, count(*) FROM dead_letter_events WHERE state = 'dead' AND code IS NOT NULL
GROUP BY code ORDER BY code
"""


def read_figures(path: Path, *, finished: int, deadline_seconds: float) -> StoreFigures:
    """Return the figures of a store; its cost grows with chunks, not with requests.

    Args:
        path: Of the file.
        finished: How many finished batches are named.
        deadline_seconds: How long others may keep it locked.

    Raises:
        StoreLocked: They did longer.
        StorageError: It cannot be read, or has another schema.
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


def _batches(db: duckdb.DuckDBPyConnection, rest: str) -> tuple[BatchFigures, ...]:
    return tuple(
        BatchFigures(
            batch_id=row["batch_id"],
            status=BatchStatus(row["status"]),
            created_at=rows.posix_seconds(row["created_at"]),
            total=row["requests"],
            completed=row["completed"],
            failed=row["failed"],
        )
        for row in rows.select(db, "batches", _BATCH, rest)
    )


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
        self._accounts: dict[str, dict[str, TimeBreakdown]] = {}

    def refresh(self) -> None:
        """Read the accounts that have changed."""
        for batch_id, changed_at in self._folders():
            if self._changed_at.get(batch_id) != changed_at:
                self._changed_at[batch_id] = changed_at
                known = self._accounts.setdefault(batch_id, {})
                known.update((a.run_id, a) for a in read_accounts(self._folder, batch_id))

    def of(self, batch_id: str) -> list[TimeBreakdown]:
        """Return the accounts of a batch."""
        return list(self._accounts.get(batch_id, {}).values())

    def all(self) -> Iterator[TimeBreakdown]:
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
