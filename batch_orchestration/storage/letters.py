"""Dead letters in the store: the queue `failed_requests`, and the history `dead_letter_events`."""

from collections.abc import Sequence
from typing import Any

import duckdb

from batch_orchestration.core.dead_letters import (
    DeadLetter,
    DeadLetterEvent,
    DeadLetterState,
    Selection,
)
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.storage import rows

_STATE = {
    "state": "object",
    "first_failed_at": "datetime64[us]",
    "last_failed_at": "datetime64[us]",
    "replay": "Int64",
    "resolved_at": "datetime64[us]",
    "discarded_at": "datetime64[us]",
    "discard_reason": "object",
}
#: Columns of `failed_requests`, with their types.
LETTERS = {**rows.FAILED_REQUESTS, **_STATE}
_EVENTS = {
    "batch_id": "object",
    "request_index": "int64",
    "happened_at": "datetime64[us]",
    "state": "object",
    "actor": "object",
    "operation": "Int64",
    "code": "object",
    "reason": "object",
    "engine": "object",
    "settings_hash": "object",
}
#: A request that counts as failed: every one but those that were answered later.
UNRESOLVED = "state <> 'resolved'"


def new_letter(failed_row: rows.Row) -> rows.Row:
    """Return the row of a request whose failure has just become final."""
    attempts = rows.decode_attempts(failed_row["failed_attempts"])
    settled_at = failed_row["settled_at"]
    return {
        **failed_row,
        **dict.fromkeys(_STATE),
        "state": str(DeadLetterState.DEAD),
        "first_failed_at": rows.timestamp(attempts[0].at) if attempts else settled_at,
        "last_failed_at": settled_at,
    }


def dead_event(letter: rows.Row, operation: int | None = None) -> rows.Row:
    """Return the event of a failure that has become final."""
    return {
        **{name: letter[name] for name in ("batch_id", "request_index", "code", "settings_hash")},
        "happened_at": letter["settled_at"],
        "state": str(DeadLetterState.DEAD),
        "actor": letter["run_id"],
        "operation": operation,
        "reason": letter["message"],
        "engine": letter["engine"],
    }


def resolved_by_commit(letter: rows.Row, result: rows.Row) -> rows.Row:
    """Return a dead letter whose chunk was committed again, now with an answer."""
    return {**letter, "state": "resolved", "resolved_at": result["settled_at"]}


def resolved_event(letter: rows.Row, *, run_id: str) -> rows.Row:
    """Return the event of a dead letter that `resolved_by_commit` made."""
    reason = "its chunk was committed again, with an answer"
    return dead_event(letter) | {
        "happened_at": letter["resolved_at"],
        "state": str(DeadLetterState.RESOLVED),
        "actor": run_id,
        "reason": reason,
    }


def insert_letters(db: duckdb.DuckDBPyConnection, letters: Sequence[rows.Row]) -> None:
    """Insert rows of `failed_requests`."""
    rows.insert(db, "failed_requests", LETTERS, letters)


def insert_events(db: duckdb.DuckDBPyConnection, events: Sequence[rows.Row]) -> None:
    """Add to the history what it does not have yet."""
    if events:
        same = " AND ".join(
            f"known.{name} IS NOT DISTINCT FROM incoming.{name}"
            for name in ("batch_id", "request_index", "happened_at", "state", "operation", "code")
        )
        unless = f"WHERE NOT EXISTS (FROM dead_letter_events known WHERE {same})"
        rows.insert(db, "dead_letter_events", _EVENTS, events, unless)


def select_letters(
    db: duckdb.DuckDBPyConnection, batch_id: str, selection: Selection
) -> list[DeadLetter]:
    """Return the dead letters that are meant, in index order."""
    where, parameters = _condition(batch_id, selection)
    found = rows.select(db, "failed_requests", [*LETTERS], where, parameters)
    return [_letter(row) for row in found]


def select_codes(
    db: duckdb.DuckDBPyConnection, batch_id: str, selection: Selection
) -> dict[int, FailureCode]:
    """Return the failure codes of the dead letters that are meant, by index, in order."""
    where, parameters = _condition(batch_id, selection)
    found = db.execute(f"SELECT request_index, code FROM failed_requests {where}", parameters)
    return {index: FailureCode(code) for index, code in found.fetchall()}


def _condition(batch_id: str, selection: Selection) -> tuple[str, list[Any]]:
    where = "WHERE batch_id = ?"
    parameters: list[Any] = [batch_id]
    for column, values in (
        ("code", selection.codes),
        ("custom_id", selection.custom_ids),
        ("state", selection.states),
    ):
        if values:
            where += f" AND {column} IN (SELECT unnest(?::VARCHAR[]))"
            parameters.append([str(value) for value in values])
    where += " ORDER BY request_index"
    if selection.limit is not None:
        where += f" LIMIT {int(selection.limit)}"
    return where, parameters


def events(
    db: duckdb.DuckDBPyConnection, batch_id: str, index: int | None
) -> list[DeadLetterEvent]:
    """Return the history of a batch's dead letters, or of one of them, oldest first."""
    where = "WHERE batch_id = ? AND request_index = coalesce(?, request_index)"
    rest = f"{where} ORDER BY happened_at, request_index, operation NULLS FIRST"
    found = rows.select(db, "dead_letter_events", [*_EVENTS], rest, [batch_id, index])
    return [
        DeadLetterEvent(
            index=row["request_index"],
            at=rows.posix_seconds(row["happened_at"]),
            state=DeadLetterState(row["state"]),
            **{
                name: row[name]
                for name in ("actor", "operation", "code", "reason", "engine", "settings_hash")
            },
        )
        for row in found
    ]


def _letter(row: rows.Row) -> DeadLetter:
    request = rows.settled_request(row)
    assert isinstance(request.outcome, Failure)
    return DeadLetter(
        request=request,
        chunk=row["chunk"],
        state=DeadLetterState(row["state"]),
        first_failed_at=rows.posix_seconds(row["first_failed_at"]),
        last_failed_at=rows.posix_seconds(row["last_failed_at"]),
        replay=row["replay"],
        resolved_at=row["resolved_at"] and rows.posix_seconds(row["resolved_at"]),
        discarded_at=row["discarded_at"] and rows.posix_seconds(row["discarded_at"]),
        discard_reason=row["discard_reason"],
    )
