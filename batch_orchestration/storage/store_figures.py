"""Reads the figures of the whole store in one short transaction, and never makes or changes it."""

from pathlib import Path

import duckdb

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.core.results import LATENCY_BOUNDS
from batch_orchestration.domain.store_figures import BatchFigures, StoreFigures
from batch_orchestration.store import rows
from batch_orchestration.store.connection import reading

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
