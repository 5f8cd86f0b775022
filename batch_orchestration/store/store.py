"""The store: every query to the DuckDB file, in words of the domain."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import duckdb

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.dead_letters import (
    UNRESOLVED,
    DeadLetter,
    DeadLetterEvent,
    Operation,
    Replay,
    Selection,
)
from batch_orchestration.core.errors import BatchNotFound, StorageError
from batch_orchestration.core.lifecycle import FINAL, BatchEvent
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.results import BatchRecord, ChunkReport, SettledRequest
from batch_orchestration.files.journal_reading import JournalEntry
from batch_orchestration.store import connection, rows, schema
from batch_orchestration.store import dead_letters as letter_operations
from batch_orchestration.store import dead_letters as letters
from batch_orchestration.store import statements as commits
from batch_orchestration.store import statements as statuses
from batch_orchestration.store.questions import ask

_TABLES = (
    *("batches", "chunks", "results", "failed_requests"),
    *("dead_letter_events", "batch_events"),
)


class Store:
    """Batches, chunks, results and failed requests in one DuckDB file, made when it is missing.

    Each method opens the file, does one transaction and closes it; between them others can come in.
    While the file is locked, methods wait. Processes and threads may share a store.

    Every method raises `StoreLocked` if the wait is too long, and `StorageError` if the file is
    damaged or cannot be used.

    Args:
        path: Of the file.
        deadline_seconds: How long a method waits for others to leave the file.
        root: Of the data folder, whose journals have what is too large for the file; where the file
            lies, unless it is told.
    """

    def __init__(
        self,
        path: Path,
        *,
        deadline_seconds: float = connection.DEADLINE_SECONDS,
        root: Path | None = None,
    ) -> None:
        self._path = path
        self._root = path.parent if root is None else root
        self._deadline_seconds = deadline_seconds

    @property
    def exists(self) -> bool:
        """Whether there is a file: looking for what it knows need not make one."""
        return self._path.exists()

    def migrate(self) -> None:
        """Bring the file to the present schema. Every other method does so first: it is cheap."""
        schema.migrate(self._path, deadline_seconds=self._deadline_seconds)

    def check_writable(self) -> None:
        """Commit a change that changes nothing.

        Raises:
            DiskFull: There is no room.
            StorageError: The file cannot be written.
        """
        with self.writing() as db:
            db.execute("UPDATE schema_migrations SET name = name")

    def add_batch(self, plan: BatchPlan, *, at: float, actor: str = "admission") -> None:
        """Add a batch that was admitted: in progress, all chunks pending. Twice is as once."""
        with self.writing() as db:
            known = rows.select(db, "batches", ["identity"], "WHERE batch_id = ?", [plan.batch_id])
            if known and known[0]["identity"] != plan.identity:
                raise StorageError(f"another batch has the id {plan.batch_id}")
            if known:
                return
            commits.insert_batch(db, plan, at)
            statuses.record_admission(db, plan, at=at, actor=actor)

    def commit_chunk(
        self,
        batch_id: str,
        number: int,
        requests: Iterable[SettledRequest],
        *,
        run_id: str,
        at: float,
        seconds: float,
        memory_level: str | None = None,
    ) -> ChunkReport:
        """Commit the outcomes of a chunk, all or nothing. Committing it again replaces them.

        But what a replay or a discard did to a dead letter is not undone by it.

        Args:
            batch_id: Of the batch.
            number: Of the chunk.
            requests: Every request of the chunk, each once; they are taken one by one.
            run_id: Of the run that commits.
            at: POSIX seconds.
            seconds: See `ChunkReport`.
            memory_level: See `ChunkReport`.

        Raises:
            OutcomeMismatch: A request is missing, repeated or not of this chunk.
            BatchNotFound: The store does not have this chunk.
        """
        outcomes = commits.ChunkOutcomes(batch_id, number, requests, self._root)
        with self.writing() as db:
            outcomes.check_one_to_one(db)
            outcomes.replace(db, run_id=run_id)
            commits.update_chunk(
                db, batch_id, number,
                run_id=run_id, at=at, seconds=seconds, memory_level=memory_level,
            )  # fmt: skip
            commits.update_batch(db, batch_id)
            (report,) = commits.chunk_reports(db, commits.OF_CHUNK, [batch_id, number])
        return report

    def chunk_reports(self, batch_id: str) -> dict[int, ChunkReport]:
        """Return the figures of the committed chunks of a batch, by number."""
        with self.reading() as db:
            reports = commits.chunk_reports(db, "WHERE batch_id = ?", [batch_id])
        return {report.number: report for report in reports}

    def tokens_since(self, at: float) -> dict[str, int]:
        """Return the tokens, prompt and answer, of the chunks committed since, by batch id."""
        with self.reading() as db:
            return commits.tokens_since(db, rows.timestamp(at))

    def batch(self, batch_id: str) -> BatchRecord:
        """Return a batch.

        Raises:
            BatchNotFound: The store does not have it.
        """
        if found := self._batches("WHERE batch_id = ?", [batch_id]):
            return found[0]
        raise BatchNotFound(f"no batch {batch_id!r} in {self._path}")

    def batches(self) -> list[BatchRecord]:
        """Return all batches, newest first."""
        return self._batches("ORDER BY created_at DESC, batch_id")

    def unfinished(self) -> list[BatchRecord]:
        """Return the batches that were admitted and have not ended, newest first."""
        marks = ", ".join("?" * len(FINAL))
        return self._batches(
            f"WHERE status NOT IN ({marks}) ORDER BY created_at DESC, batch_id", sorted(FINAL)
        )

    def records(self, batch_ids: Iterable[str]) -> dict[str, BatchRecord]:
        """Return those of these batches that the store has, by id."""
        if not (names := [*batch_ids]):
            return {}
        found = self._batches("WHERE batch_id IN (SELECT unnest(?::VARCHAR[]))", [names])
        return {record.batch_id: record for record in found}

    def submitted(
        self, *, since: float, requests_per_second: float, now: float
    ) -> list[BatchRecord]:
        """Return the batches created since a moment, or whose requests at this rate last until now.

        Moments are POSIX seconds.
        """
        return self._batches(
            "WHERE created_at >= ? OR requests >= ? * epoch(? - created_at)",
            [
                rows.timestamp(since),
                requests_per_second,
                rows.timestamp(now),
            ],
        )

    def is_empty(self) -> bool:
        """Whether no batch was ever added, as in a store that was just made."""
        with self.reading() as db:
            return not rows.select(db, "batches", ["batch_id"], "LIMIT 1")

    def find_identity(self, identity: str) -> BatchRecord | None:
        """Return the batch with this content and these options, if there is one."""
        found = self._batches("WHERE identity = ?", [identity])
        return found[0] if found else None

    def set_status(
        self, batch_id: str, status: BatchStatus, *, at: float, actor: str, reason: str
    ) -> None:
        """Bring a batch into a status; if it has that status already, nothing changes.

        Args:
            batch_id: Of the batch.
            status: The new one.
            at: POSIX seconds.
            actor: Run, person or sensor that does it.
            reason: Why, for people.

        Raises:
            BatchNotFound: The store does not have it.
            IllegalTransition: Its status does not allow this one; nothing changed.
        """
        with self.writing() as db:
            statuses.change_status(db, batch_id, status, at=at, actor=actor, reason=reason)

    def reopen_batch(
        self,
        batch_id: str,
        codes: Iterable[FailureCode],
        *,
        at: float,
        actor: str,
        reason: str,
    ) -> int:
        """Bring a batch back into progress, and its chunks with dead letters of these codes, too.

        The dead letters stay: the next commit of their chunk resolves them.

        Returns:
            How many chunks are pending again.

        Raises:
            BatchNotFound: The store does not have it.
            IllegalTransition: Its status does not allow that; nothing changed.
        """
        with self.writing() as db:
            ready = BatchStatus.IN_PROGRESS
            statuses.change_status(db, batch_id, ready, at=at, actor=actor, reason=reason)
            numbers = commits.take_back(db, batch_id, codes)
            commits.update_batch(db, batch_id)
        return len(numbers)

    def batch_events(self, batch_id: str) -> list[BatchEvent]:
        """Return every status that a batch was in, oldest first, with who and why."""
        with self.reading() as db:
            return statuses.events(db, batch_id)

    def settled(self, batch_id: str) -> Iterator[SettledRequest]:
        """Yield the requests of the committed chunks in index order.

        The rows of one chunk are in memory at a time, and the file is not held between chunks. See
        `SettledRequest` for bodies.

        Raises:
            FileDamaged: A journal does not have an answer that the store left to it.
        """
        for number in sorted(self.chunk_reports(batch_id)):
            yield from self.settled_in(batch_id, number)

    def settled_in(self, batch_id: str, number: int) -> Iterator[SettledRequest]:
        """Yield the requests of one committed chunk, as `settled` does; else nothing."""
        with self.reading() as db:
            found = commits.settled_rows(db, batch_id, number)
        for row in found:
            yield rows.settled_request(rows.with_response(row, self._root))

    def journals_with_answers(self) -> set[Path]:
        """Return the journals that have answers which are too large for the store."""
        with self.reading() as db:
            return {self._root / name for name in commits.journals_with_answers(db)}

    def failures(self, batch_id: str, *, limit: int | None = None) -> list[SettledRequest]:
        """Return the failed requests of the committed chunks in index order."""
        found = self.dead_letters(batch_id, Selection(states=UNRESOLVED, limit=limit))
        return [letter.request for letter in found]

    def dead_letters(self, batch_id: str, selection: Selection) -> list[DeadLetter]:
        """Return the dead letters that are meant, in index order.

        An engine's answer that is in a journal is not read for it: the failure then has no body.
        """
        with self.reading() as db:
            return letters.select_letters(db, batch_id, selection)

    def dead_letter_codes(self, batch_id: str, selection: Selection) -> dict[int, FailureCode]:
        """Return index and code of the dead letters that are meant: there may be very many."""
        with self.reading() as db:
            return letters.select_codes(db, batch_id, selection)

    def dead_letter_events(self, batch_id: str, index: int | None = None) -> list[DeadLetterEvent]:
        """Return the history of a batch's dead letters, or of one of them, oldest first."""
        with self.reading() as db:
            return letters.events(db, batch_id, index)

    def apply_operations(
        self,
        batch_id: str,
        operations: Iterable[Operation],
        outcomes: Callable[[Replay], Iterable[JournalEntry]],
    ) -> None:
        """Bring the dead letters of a batch up to date with what was done to them.

        All or nothing; applying the same operations again changes nothing.

        Args:
            batch_id: Of the batch.
            operations: All of the batch, in their order.
            outcomes: Reads the outcomes that a replay has so far.
        """
        with self.writing() as db:
            for number in letter_operations.apply(db, operations, outcomes, self._root):
                commits.count_chunk(db, batch_id, number)
            commits.update_batch(db, batch_id)

    def failure_counts(self, batch_id: str) -> dict[str, int]:
        """Return how many requests failed with each code, the most frequent first."""
        with self.reading() as db:
            return commits.failure_counts(db, "WHERE batch_id = ?", [batch_id])

    def check_sound(self) -> None:
        """Read everything, so that damage shows.

        Raises:
            StoreDamaged: Something cannot be read.
        """
        with self.reading() as db:
            for table in _TABLES:
                db.execute(f"SELECT bit_xor(hash(everything)) FROM {table} everything").fetchall()

    def query(self, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Return column names and rows of a person's SQL, which can only read the store.

        Raises:
            StorageError: See `questions.ask`.
        """
        self.migrate()
        return ask(self._path, sql, deadline_seconds=self._deadline_seconds)

    def _batches(self, rest: str, parameters: Sequence[Any] = ()) -> list[BatchRecord]:
        with self.reading() as db:
            found = rows.select(db, "batches", rows.BATCHES, rest, parameters)
        return [rows.batch_record(row) for row in found]

    def reading(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """Open the file, at the present schema, for one transaction that only reads."""
        self.migrate()
        return connection.reading(self._path, deadline_seconds=self._deadline_seconds)

    def writing(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """Open the file, at the present schema, for one transaction that may change it."""
        self.migrate()
        return connection.writing(self._path, deadline_seconds=self._deadline_seconds)
