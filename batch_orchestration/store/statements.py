"""SQL for batches, chunks and status changes, run within the caller's transaction."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.errors import BatchNotFound, OutcomeMismatch
from batch_orchestration.core.lifecycle import BatchEvent, check_transition, times_after
from batch_orchestration.core.outcomes import Completion, FailureCode
from batch_orchestration.core.results import LATENCY_BOUNDS, ChunkReport, SettledRequest
from batch_orchestration.store import dead_letters as letters
from batch_orchestration.store import rows

OF_CHUNK = "WHERE batch_id = ? AND chunk = ?"
_SUM = "coalesce(sum({}), 0)"
_PROMPT_TOKENS, _COMPLETION_TOKENS = map(_SUM.format, ("prompt_tokens", "completion_tokens"))
_WITHIN = ", ".join(f"count(*) FILTER (latency_seconds <= {bound})" for bound in LATENCY_BOUNDS)
_LATENCY_COUNTS = f"[{_WITHIN}, count(*)]"
_LATENCY_MICROS = "coalesce(sum(try_cast(latency_seconds * 1e6 AS BIGINT)), 0)"
_FAILED = f"{OF_CHUNK} AND {letters.UNRESOLVED}"


def insert_batch(db: duckdb.DuckDBPyConnection, plan: BatchPlan, at: float) -> None:
    """Insert a batch as in progress and its chunks as pending."""
    batch = rows.batch_row(plan, at)
    marks = ", ".join("?" * len(batch))
    db.execute(f"INSERT INTO batches ({', '.join(batch)}) VALUES ({marks})", list(batch.values()))
    chunks = [
        {
            "batch_id": plan.batch_id,
            "chunk": chunk.number,
            "first_index": chunk.first_index,
            "requests": chunk.requests,
            "status": "pending",
        }
        for chunk in plan.chunks
    ]
    rows.insert(db, "chunks", chunks)


class ChunkOutcomes:
    """The rows of one chunk, built before the file is opened and locked.

    Args:
        settled: The chunk's requests, consumed one by one.
        root: Root of the data folder.
    """

    def __init__(
        self, batch_id: str, number: int, settled: Iterable[SettledRequest], root: Path
    ) -> None:
        self.batch_id = batch_id
        self.number = number
        self.results: list[rows.Row] = []
        self.failed: list[rows.Row] = []
        budget = rows.RowBudget(root)
        for request in settled:
            if isinstance(request.outcome, Completion):
                result = rows.result_row(batch_id, number, request, request.outcome)
                self.results.append(budget.fit(result, request))
            else:
                failed = rows.failed_row(batch_id, number, request, request.outcome)
                self.failed.append(letters.new_letter(budget.fit(failed, request)))
        budget.sync()

    def check_one_to_one(self, db: duckdb.DuckDBPyConnection) -> None:
        """Check that each request of the planned chunk has exactly one row.

        Raises:
            OutcomeMismatch: A request is missing, repeated or not of this chunk.
            BatchNotFound: The store does not have this chunk.
        """
        key = [self.batch_id, self.number]
        found = rows.select(db, "chunks", ["first_index", "requests"], OF_CHUNK, key)
        if not found:
            raise BatchNotFound(f"the store has no chunk {self.batch_id}/{self.number:05d}")
        first = found[0]["first_index"]
        planned = set(range(first, first + found[0]["requests"]))
        given = [row["request_index"] for row in (*self.results, *self.failed)]
        if set(given) != planned or len(given) != len(planned):
            raise OutcomeMismatch(
                f"{self.batch_id}/{self.number:05d} has {len(planned)} requests, not "
                f"{len(given)} outcomes: missing {sorted(planned.difference(given))[:5]}, "
                f"unknown {sorted(set(given) - planned)[:5]}, "
                f"{len(given) - len(set(given))} repeated"
            )

    def replace(self, db: duckdb.DuckDBPyConnection, *, run_id: str) -> None:
        """Replace the chunk's rows, if any, with the new ones.

        The rows of a discarded dead letter are left unchanged, and so are those of a replayed one.
        But if the chunk has an answer and the replay does not, the chunk's answer is written,
        whatever the replay's later result. Dead letters are never deleted: one that is answered
        now stays as `resolved`.
        """
        key = [self.batch_id, self.number]
        before = rows.select(db, "failed_requests", letters.WITHOUT_TEXTS, OF_CHUNK, key)
        answers = {row["request_index"]: row for row in self.results}
        standing: set[int] = set()
        resolved: list[rows.Row] = []
        for letter in before:
            index = letter["request_index"]
            if _stands(letter, answered=index in answers):
                standing.add(index)
            elif index in answers:
                resolved.append({**letter, "resolved_at": answers[index]["settled_at"]})
        staying = standing.union(letter["request_index"] for letter in resolved)
        others = f"{OF_CHUNK} AND request_index NOT IN (SELECT unnest(?::BIGINT[]))"
        db.execute(f"DELETE FROM results {others}", [*key, [*standing]])
        db.execute(f"DELETE FROM failed_requests {others}", [*key, [*staying]])
        results = [row for row in self.results if row["request_index"] not in standing]
        failed = [row for row in self.failed if row["request_index"] not in standing]
        rows.insert(db, "results", results)
        rows.insert(db, "failed_requests", failed)
        letters.insert_events(db, [letters.dead_event(row) for row in failed])
        letters.resolve_by_commit(db, resolved, run_id=run_id)


def _stands(letter: rows.Row, *, answered: bool) -> bool:
    """Whether a commit of the chunk, which may have an answer, leaves a dead letter unchanged."""
    if letter["state"] == "discarded":
        return True
    return letter["replay"] is not None and (letter["state"] == "resolved" or not answered)


def update_chunk(
    db: duckdb.DuckDBPyConnection,
    batch_id: str,
    number: int,
    *,
    run_id: str,
    at: float,
    seconds: float,
    memory_level: str | None,
) -> None:
    """Mark the chunk as committed, and set its figures from its rows."""
    db.execute(
        "UPDATE chunks SET status = 'committed', seconds = ?, committed_at = ?, run_id = ?,"
        f" memory_level = ? {OF_CHUNK}",
        [seconds, rows.timestamp(at), run_id, memory_level, batch_id, number],
    )
    count_chunk(db, batch_id, number)


def count_chunk(db: duckdb.DuckDBPyConnection, batch_id: str, number: int) -> None:
    """Set the chunk's figures from its rows."""
    # A single statement with a subquery per figure would take three times as long.
    key = [batch_id, number]
    ((completed, attempts, *figures),) = db.execute(
        f"""
        SELECT count(*), coalesce(sum(attempts), 0), {_PROMPT_TOKENS}, {_COMPLETION_TOKENS},
            {_LATENCY_COUNTS}, {_LATENCY_MICROS}
        FROM results {OF_CHUNK}
        """,
        key,
    ).fetchall()
    failed = db.execute(
        f"""
        SELECT code, count(*), sum(attempts) FROM failed_requests {_FAILED}
        GROUP BY code ORDER BY count(*) DESC, code
        """,
        key,
    ).fetchall()
    codes = {code: count for code, count, _ in failed}
    attempts += sum(of_code for _, _, of_code in failed)
    db.execute(
        f"""
        UPDATE chunks SET completed = ?, failed = ?, attempts = ?, prompt_tokens = ?,
            completion_tokens = ?, latency_counts = ?, latency_micros = ?, failures_by_code = ?
        {OF_CHUNK}
        """,
        [
            *(completed, sum(codes.values()), attempts, *figures),
            msgspec.json.encode(codes).decode(),
            *key,
        ],
    )


def take_back(
    db: duckdb.DuckDBPyConnection, batch_id: str, codes: Iterable[FailureCode]
) -> list[int]:
    """Set the chunks with a dead letter of these codes to pending; return their numbers.

    Their answers are removed, because the journals have them; answers of replays stay. A chunk's
    figures stay until its next commit, so that sums over all chunks ever committed never fall.
    Until then, they do not match the chunk's rows.
    """
    found = db.execute(
        """
        SELECT DISTINCT chunk FROM failed_requests
        WHERE batch_id = ? AND state = 'dead' AND code IN (SELECT unnest(?::VARCHAR[]))
        ORDER BY chunk
        """,
        [batch_id, [str(code) for code in codes]],
    ).fetchall()
    numbers = [number for (number,) in found]
    among = "WHERE batch_id = ? AND chunk IN (SELECT unnest(?::INTEGER[]))"
    db.execute(
        f"""
        DELETE FROM results {among} AND request_index NOT IN (
            SELECT request_index FROM failed_requests {among} AND replay IS NOT NULL)
        """,
        [batch_id, numbers, batch_id, numbers],
    )
    db.execute(f"UPDATE chunks SET status = 'pending' {among}", [batch_id, numbers])
    return numbers


def update_batch(db: duckdb.DuckDBPyConnection, batch_id: str) -> None:
    """Set the batch's figures from its chunks."""
    ((*figures,),) = db.execute(
        f"""
        SELECT count(*), coalesce(sum(completed), 0), coalesce(sum(failed), 0),
            {_PROMPT_TOKENS}, {_COMPLETION_TOKENS}
        FROM chunks WHERE batch_id = ? AND status = 'committed'
        """,
        [batch_id],
    ).fetchall()
    db.execute(
        """
        UPDATE batches SET chunks_committed = ?, completed = ?, failed = ?, prompt_tokens = ?,
            completion_tokens = ? WHERE batch_id = ?
        """,
        [*figures, batch_id],
    )


def failure_counts(
    db: duckdb.DuckDBPyConnection, where: str, parameters: Sequence[Any]
) -> dict[str, int]:
    """Return the number of failed requests matching `where` by code, the most frequent first."""
    return dict(
        db.execute(
            f"SELECT code, count(*) FROM failed_requests {where} AND {letters.UNRESOLVED}"
            " GROUP BY code"
            " ORDER BY count(*) DESC, code",
            list(parameters),
        ).fetchall()
    )


def chunk_reports(
    db: duckdb.DuckDBPyConnection, where: str, parameters: Sequence[Any]
) -> list[ChunkReport]:
    """Return the figures of the committed chunks matching `where`, in order."""
    rest = f"{where} AND status = 'committed' ORDER BY chunk"
    found = rows.select(db, "chunks", rows.CHUNK_REPORTS, rest, parameters)
    return [rows.chunk_report(row) for row in found]


def tokens_since(db: duckdb.DuckDBPyConnection, moment: datetime) -> dict[str, int]:
    """Return prompt plus completion tokens of the chunks committed since `moment`, by batch id."""
    return {
        batch_id: int(tokens)
        for batch_id, tokens in db.execute(
            "SELECT batch_id, sum(prompt_tokens::HUGEINT + completion_tokens) FROM chunks"
            " WHERE status = 'committed' AND committed_at >= ? GROUP BY batch_id",
            [moment],
        ).fetchall()
    }


def settled_rows(db: duckdb.DuckDBPyConnection, batch_id: str, number: int) -> list[rows.Row]:
    """Return the rows of a chunk in index order; none unless it is committed now."""
    if not chunk_reports(db, OF_CHUNK, [batch_id, number]):
        return []
    found = [
        row
        for table, where in (("results", OF_CHUNK), ("failed_requests", _FAILED))
        for row in rows.select(db, table, ["*"], where, [batch_id, number])
    ]
    found.sort(key=lambda row: row["request_index"])
    return found


def journals_with_answers(db: duckdb.DuckDBPyConnection) -> set[str]:
    """Return the journals with responses that the store lacks, as paths below the data folder."""
    found = db.execute(
        """
        SELECT DISTINCT regexp_replace(response_at, ':[0-9+]*$', '') FROM (
            SELECT response_at FROM results UNION ALL SELECT response_at FROM failed_requests)
        WHERE response_at IS NOT NULL
        """
    ).fetchall()
    return {name for (name,) in found}


_COLUMNS = ("happened_at", "from_status", "to_status", "actor", "reason")


def record_admission(
    db: duckdb.DuckDBPyConnection, plan: BatchPlan, *, at: float, actor: str
) -> None:
    """Insert the first two events of a batch that was just inserted."""
    begin, ready = BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS
    reason = f"file {plan.file_name}"
    _insert(db, plan.batch_id, begin, from_status=None, at=plan.created_at, by=(actor, reason))
    reason = f"{plan.requests:,} requests, {plan.faulty:,} of them faulty"
    _insert(db, plan.batch_id, ready, from_status=begin, at=at, by=(actor, reason))


def change_status(
    db: duckdb.DuckDBPyConnection,
    batch_id: str,
    status: BatchStatus,
    *,
    at: float,
    actor: str,
    reason: str,
) -> None:
    """Change a batch's status, record time and event; do nothing if it already has the status.

    Raises:
        BatchNotFound: The store does not have the batch.
        IllegalTransition: The status cannot follow the batch's current one.
    """
    columns = ["status", *rows.STATUS_TIMES.values()]
    found = rows.select(db, "batches", columns, "WHERE batch_id = ?", [batch_id])
    if not found:
        raise BatchNotFound(f"the store has no batch {batch_id!r}")
    old = BatchStatus(found[0]["status"])
    check_transition(old, status)
    if status is old:
        return
    times = times_after(rows.status_times(found[0]), status, at)
    values: dict[str, Any] = {"status": str(status)}
    for word, column in rows.STATUS_TIMES.items():
        values[column] = rows.timestamp(times[word]) if word in times else None
    changes = ", ".join(f"{column} = ?" for column in values)
    db.execute(f"UPDATE batches SET {changes} WHERE batch_id = ?", [*values.values(), batch_id])
    _insert(db, batch_id, status, from_status=old, at=at, by=(actor, reason))


def events(db: duckdb.DuckDBPyConnection, batch_id: str) -> list[BatchEvent]:
    """Return the status changes of a batch, oldest first."""
    rest = "WHERE batch_id = ? ORDER BY number"
    found = rows.select(db, "batch_events", _COLUMNS, rest, [batch_id])
    return [rows.struct_of(BatchEvent, row, at=row["happened_at"]) for row in found]


def _insert(
    db: duckdb.DuckDBPyConnection,
    batch_id: str,
    status: BatchStatus,
    *,
    from_status: BatchStatus | None,
    at: float,
    by: tuple[str, str],
) -> None:
    db.execute(
        """
        INSERT INTO batch_events (batch_id, number, happened_at, from_status, to_status, actor,
            reason)
        SELECT ?, 1 + count(*), ?, ?, ?, ?, ? FROM batch_events WHERE batch_id = ?
        """,
        [
            batch_id,
            rows.timestamp(at),
            from_status and str(from_status),
            str(status),
            *map(rows.text, by),
            batch_id,
        ],
    )
