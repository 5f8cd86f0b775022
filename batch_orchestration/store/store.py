"""The store: queries and changes of the DuckDB file, in terms of core values."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import duckdb

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.dead_letters import (
    UNRESOLVED,
    DeadLetter,
    Operation,
    Replay,
    Selection,
)
from batch_orchestration.core.errors import BatchNotFound, StorageError
from batch_orchestration.core.lifecycle import FINAL, BatchEvent
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.results import BatchRecord, ChunkReport, SettledRequest
from batch_orchestration.files.journal_reading import JournalEntry
from batch_orchestration.store import connection, rows, schema, statements
from batch_orchestration.store import dead_letters as letters
from batch_orchestration.store.user_queries import ask

_TABLES = (
    *("batches", "chunks", "results", "failed_requests"),
    *("dead_letter_events", "batch_events"),
)


class Store:
    """Batches, chunks, results and failed requests in one DuckDB file, created if missing.

    Each method opens the file, runs one transaction and closes it, so that others can use the file
    in between. While the file is locked, methods wait. Processes and threads may share a store.

    Every method raises `StoreLocked` if the wait is too long, and `StorageError` if the file is
    damaged or unusable.

    Args:
        deadline_seconds: Longest wait of a method while the file is locked.
        root: Root of the data folder, whose journals hold the responses that are too large for the
            file; defaults to the file's folder.
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
        """Whether the file exists; a caller that only reads can avoid creating it."""
        return self._path.exists()

    def migrate(self) -> None:
        """Migrate the file to the current schema; every other method does so first. Cheap."""
        schema.migrate(self._path, deadline_seconds=self._deadline_seconds)

    def check_writable(self) -> None:
        """Check that the file is writable, by a commit that changes no value.

        Raises:
            DiskFull: There is no space left.
            StorageError: The file cannot be written.
        """
        with self.writing() as db:
            db.execute("UPDATE schema_migrations SET name = name")

    def add_batch(self, plan: BatchPlan, *, at: float, actor: str = "admission") -> None:
        """Add an admitted batch: in progress, with all chunks pending. Idempotent.

        Raises:
            StorageError: Another batch has the same id.
        """
        with self.writing() as db:
            known = rows.select(db, "batches", ["identity"], "WHERE batch_id = ?", [plan.batch_id])
            if known and known[0]["identity"] != plan.identity:
                raise StorageError(f"another batch has the id {plan.batch_id}")
            if known:
                return
            statements.insert_batch(db, plan, at)
            statements.record_admission(db, plan, at=at, actor=actor)

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
        """Commit the outcomes of a chunk, all or nothing. Another commit replaces them.

        A commit does not undo the effect of a replay or discard on a dead letter.

        Args:
            requests: Every request of the chunk exactly once; consumed one by one.
            run_id: The run that statements.
            seconds: See `ChunkReport`.
            memory_level: See `ChunkReport`.

        Raises:
            OutcomeMismatch: A request is missing, repeated or not of this chunk.
            BatchNotFound: The store does not have this chunk.
        """
        outcomes = statements.ChunkOutcomes(batch_id, number, requests, self._root)
        with self.writing() as db:
            outcomes.check_one_to_one(db)
            outcomes.replace(db, run_id=run_id)
            statements.update_chunk(
                db, batch_id, number,
                run_id=run_id, at=at, seconds=seconds, memory_level=memory_level,
            )  # fmt: skip
            statements.update_batch(db, batch_id)
            (report,) = statements.chunk_reports(db, statements.OF_CHUNK, [batch_id, number])
        return report

    def chunk_reports(self, batch_id: str) -> dict[int, ChunkReport]:
        """Return the figures of the committed chunks of a batch, by number."""
        with self.reading() as db:
            reports = statements.chunk_reports(db, "WHERE batch_id = ?", [batch_id])
        return {report.number: report for report in reports}

    def tokens_since(self, at: float) -> dict[str, int]:
        """Return prompt plus completion tokens of the chunks committed since `at`, by batch id."""
        with self.reading() as db:
            return statements.tokens_since(db, rows.timestamp(at))

    def batch(self, batch_id: str) -> BatchRecord:
        """Return a batch.

        Raises:
            BatchNotFound: The store does not have the batch.
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
        """Return the given batches by id; ids that the store does not have are left out."""
        if not (names := [*batch_ids]):
            return {}
        found = self._batches("WHERE batch_id IN (SELECT unnest(?::VARCHAR[]))", [names])
        return {record.batch_id: record for record in found}

    def submitted(
        self, *, since: float, requests_per_second: float, now: float
    ) -> list[BatchRecord]:
        """Return the batches created since `since`, or large enough to last until `now`.

        The latter have at least `requests_per_second` requests for each second of their age.
        """
        return self._batches(
            "WHERE created_at >= ? OR requests >= ? * epoch(? - created_at)",
            [rows.timestamp(since), requests_per_second, rows.timestamp(now)],
        )

    def is_empty(self) -> bool:
        """Whether no batch was ever added, as in a newly created store."""
        with self.reading() as db:
            return not rows.select(db, "batches", ["batch_id"], "LIMIT 1")

    def find_identity(self, identity: str) -> BatchRecord | None:
        """Return the batch with this identity (content and options); None if there is none."""
        found = self._batches("WHERE identity = ?", [identity])
        return found[0] if found else None

    def set_status(
        self, batch_id: str, status: BatchStatus, *, at: float, actor: str, reason: str
    ) -> None:
        """Change the status of a batch; if it already has the status, nothing changes.

        Args:
            actor: Run, person or sensor that makes the change.
            reason: Reason as text for people.

        Raises:
            BatchNotFound: The store does not have the batch.
            IllegalTransition: The status cannot follow the batch's current one; nothing changed.
        """
        with self.writing() as db:
            statements.change_status(db, batch_id, status, at=at, actor=actor, reason=reason)

    def reopen_batch(
        self,
        batch_id: str,
        codes: Iterable[FailureCode],
        *,
        at: float,
        actor: str,
        reason: str,
    ) -> int:
        """Set a batch back to in progress, and its chunks with dead letters of `codes` to pending.

        The dead letters stay until the next commit of their chunk resolves them.

        Returns:
            The number of chunks that are pending again.

        Raises:
            BatchNotFound: The store does not have the batch.
            IllegalTransition: The batch's status does not allow it; nothing changed.
        """
        with self.writing() as db:
            ready = BatchStatus.IN_PROGRESS
            statements.change_status(db, batch_id, ready, at=at, actor=actor, reason=reason)
            numbers = statements.take_back(db, batch_id, codes)
            statements.update_batch(db, batch_id)
        return len(numbers)

    def batch_events(self, batch_id: str) -> list[BatchEvent]:
        """Return the status changes of a batch, oldest first."""
        with self.reading() as db:
            return statements.events(db, batch_id)

    def settled(self, batch_id: str) -> Iterator[SettledRequest]:
        """Yield the requests of the committed chunks in index order.

        The rows of one chunk are in memory at a time, and the file is not locked between chunks.
        For the bodies, see `SettledRequest`.

        Raises:
            FileDamaged: A response that is only in a journal cannot be read there.
        """
        for number in sorted(self.chunk_reports(batch_id)):
            yield from self.settled_in(batch_id, number)

    def settled_in(self, batch_id: str, number: int) -> Iterator[SettledRequest]:
        """Yield the requests of one chunk, like `settled`; none unless it is committed."""
        with self.reading() as db:
            found = statements.settled_rows(db, batch_id, number)
        for row in found:
            yield rows.settled_request(rows.with_response(row, self._root))

    def journals_with_answers(self) -> set[Path]:
        """Return the journals with responses that were not stored for their size."""
        with self.reading() as db:
            return {self._root / name for name in statements.journals_with_answers(db)}

    def failures(self, batch_id: str, *, limit: int | None = None) -> list[SettledRequest]:
        """Return the failed requests of the committed chunks in index order."""
        found = self.dead_letters(batch_id, Selection(states=UNRESOLVED, limit=limit))
        return [letter.request for letter in found]

    def dead_letters(self, batch_id: str, selection: Selection) -> list[DeadLetter]:
        """Return the selected dead letters in index order.

        Responses that are only in a journal are not read; these failures have no body.
        """
        with self.reading() as db:
            return letters.select_letters(db, batch_id, selection)

    def dead_letter_codes(self, batch_id: str, selection: Selection) -> dict[int, FailureCode]:
        """Return the codes of the selected dead letters by index, for very large selections."""
        with self.reading() as db:
            return letters.select_codes(db, batch_id, selection)

    def apply_operations(
        self,
        batch_id: str,
        operations: Iterable[Operation],
        outcomes: Callable[[Replay], Iterable[JournalEntry]],
    ) -> None:
        """Apply operations to the dead letters of a batch, all or nothing. Idempotent.

        Args:
            operations: All operations of the batch, in order.
            outcomes: Returns the outcomes of a replay so far.
        """
        with self.writing() as db:
            for number in letters.apply(db, operations, outcomes, self._root):
                statements.count_chunk(db, batch_id, number)
            statements.update_batch(db, batch_id)

    def failure_counts(self, batch_id: str) -> dict[str, int]:
        """Return the number of failed requests by code, the most frequent code first."""
        with self.reading() as db:
            return statements.failure_counts(db, "WHERE batch_id = ?", [batch_id])

    def check_sound(self) -> None:
        """Check the file for damage by reading all its tables.

        Raises:
            StoreDamaged: Part of the file cannot be read.
        """
        with self.reading() as db:
            for table in _TABLES:
                db.execute(f"SELECT bit_xor(hash(everything)) FROM {table} everything").fetchall()

    def query(self, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
        """Return column names and rows of a user's SQL query, which can only read the store.

        Raises:
            StorageError: See `user_queries.ask`.
        """
        self.migrate()
        return ask(self._path, sql, deadline_seconds=self._deadline_seconds)

    def _batches(self, rest: str, parameters: Sequence[Any] = ()) -> list[BatchRecord]:
        with self.reading() as db:
            found = rows.select(db, "batches", rows.BATCHES, rest, parameters)
        return [rows.batch_record(row) for row in found]

    def reading(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """Migrate the file and open it for one read-only transaction."""
        self.migrate()
        return connection.reading(self._path, deadline_seconds=self._deadline_seconds)

    def writing(self) -> AbstractContextManager[duckdb.DuckDBPyConnection]:
        """Migrate the file and open it for one transaction that may write."""
        self.migrate()
        return connection.writing(self._path, deadline_seconds=self._deadline_seconds)
