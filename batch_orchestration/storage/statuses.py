"""Statements about the status of a batch: every change is checked, timed and recorded."""

from typing import Any

import duckdb

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.errors import BatchNotFound
from batch_orchestration.core.lifecycle import BatchEvent, check_transition, times_after
from batch_orchestration.storage import rows

_COLUMNS = ("happened_at", "from_status", "to_status", "actor", "reason")


def record_admission(
    db: duckdb.DuckDBPyConnection, plan: BatchPlan, *, at: float, actor: str
) -> None:
    """Record the first two events of a batch that was just inserted."""
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
    """Bring a batch into a status, with its time and an event; nothing, if it has it already.

    Raises:
        BatchNotFound: The store does not have it.
        IllegalTransition: Its status does not allow this one.
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
    """Return the history of a batch, oldest first."""
    rest = "WHERE batch_id = ? ORDER BY number"
    return [
        BatchEvent(
            at=rows.posix_seconds(row["happened_at"]),
            from_status=row["from_status"] and BatchStatus(row["from_status"]),
            to_status=BatchStatus(row["to_status"]),
            actor=row["actor"],
            reason=row["reason"],
        )
        for row in rows.select(db, "batch_events", _COLUMNS, rest, [batch_id])
    ]


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
