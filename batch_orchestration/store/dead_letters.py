"""Dead letters in the store: the table `failed_requests`, and its history `dead_letter_events`."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from batch_orchestration.core.dead_letters import (
    DeadLetter,
    DeadLetterState,
    Discard,
    Operation,
    Replay,
    Selection,
    after_replay,
)
from batch_orchestration.core.outcomes import Completion, FailureCode
from batch_orchestration.core.results import SettledRequest
from batch_orchestration.files.journal_reading import JournalEntry
from batch_orchestration.store import rows

_RESOLVED = ("state", "resolved_at")
#: Columns of a dead letter but for its texts: they would be much memory, and do not change.
WITHOUT_TEXTS = ("* EXCLUDE (body, response)",)
#: Condition for requests that count as failed, that is, that were not answered later.
UNRESOLVED = "state <> 'resolved'"


def new_letter(failed_row: rows.Row) -> rows.Row:
    """Return the row of `failed_requests` for a failure that has just become final."""
    attempts = rows.decode_attempts(failed_row["failed_attempts"])
    settled_at = failed_row["settled_at"]
    return {
        **failed_row,
        "state": str(DeadLetterState.DEAD),
        "first_failed_at": attempts[0].at if attempts else settled_at,
        "last_failed_at": settled_at,
    }


def dead_event(letter: rows.Row, operation: int | None = None) -> rows.Row:
    """Return the event for a failure that has become final."""
    return {
        **letter,
        "happened_at": letter["settled_at"],
        "state": str(DeadLetterState.DEAD),
        "actor": letter["run_id"],
        "operation": operation,
        "reason": letter["message"],
    }


def resolve_by_commit(
    db: duckdb.DuckDBPyConnection, letters: Sequence[rows.Row], *, run_id: str
) -> None:
    """Mark dead letters as resolved that another commit of their chunk has answered.

    Args:
        letters: Their rows, with `resolved_at`.
    """
    resolved = [
        {
            **letter,
            "state": str(DeadLetterState.RESOLVED),
            "happened_at": letter["resolved_at"],
            "actor": run_id,
            "operation": None,
            "reason": "its chunk was committed again, with an answer",
        }
        for letter in letters
    ]
    rows.update(db, "failed_requests", resolved, _RESOLVED)
    insert_events(db, resolved)


def insert_events(db: duckdb.DuckDBPyConnection, events: Sequence[rows.Row]) -> None:
    """Add events to the history; events that it already has are ignored."""
    if events:
        same = " AND ".join(
            f"known.{name} IS NOT DISTINCT FROM incoming.{name}"
            for name in ("batch_id", "request_index", "happened_at", "state", "operation", "code")
        )
        unless = f"WHERE NOT EXISTS (FROM dead_letter_events known WHERE {same})"
        rows.insert(db, "dead_letter_events", events, unless)


def select_letters(
    db: duckdb.DuckDBPyConnection, batch_id: str, selection: Selection
) -> list[DeadLetter]:
    """Return the selected dead letters in index order."""
    where, parameters = _condition(batch_id, selection)
    found = rows.select(db, "failed_requests", ["*"], where, parameters)
    return [_letter(row) for row in found]


def select_codes(
    db: duckdb.DuckDBPyConnection, batch_id: str, selection: Selection
) -> dict[int, FailureCode]:
    """Return the failure codes of the selected dead letters by index, in index order."""
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


def _letter(row: rows.Row) -> DeadLetter:
    return rows.struct_of(DeadLetter, row, request=rows.settled_request(row))


#: Indices are passed as one list parameter, because there may be very many.
_AMONG = "request_index IN (SELECT unnest(?::BIGINT[]))"
_ENTRIES_AT_A_TIME = 1000
#: Reads the outcomes of a replay from its journal.
Outcomes = Callable[[Replay], Iterable[JournalEntry]]


def apply(
    db: duckdb.DuckDBPyConnection,
    operations: Iterable[Operation],
    outcomes: Outcomes,
    root: Path,
) -> set[int]:
    """Apply operations to a batch's dead letters; return the numbers of the chunks that changed."""
    changed: set[int] = set()
    budget = rows.RowBudget(root)
    for operation in operations:
        if isinstance(operation, Discard):
            _discard(db, operation)
        elif isinstance(operation, Replay):
            _begin(db, operation)
            if _held(db, operation):
                for some in _slices(outcomes(operation)):
                    changed |= _settle(db, operation, some, budget)
                _release(db, operation)
    budget.sync()
    return changed


def _slices(entries: Iterable[JournalEntry]) -> Iterator[dict[int, JournalEntry]]:
    """Yield entries by index in slices, because each entry adds its dead letter's row in memory."""
    left = iter(entries)
    while some := {entry.index: entry for entry in islice(left, _ENTRIES_AT_A_TIME)}:
        yield some


def _new_to(
    db: duckdb.DuckDBPyConnection, operation: Operation, state: DeadLetterState
) -> list[int]:
    """Return the indices of the operation's dead letters to which it has not been applied yet."""
    found = db.execute(
        f"""
        SELECT request_index FROM failed_requests letter
        WHERE batch_id = ? AND state = 'dead' AND {_AMONG} AND NOT EXISTS (
            FROM dead_letter_events event WHERE event.batch_id = letter.batch_id
            AND event.request_index = letter.request_index AND event.operation = ?
            AND event.state = ?)
        ORDER BY request_index
        """,
        [operation.batch_id, list(operation.indices), operation.number, str(state)],
    ).fetchall()
    return [index for (index,) in found]


def _discard(db: duckdb.DuckDBPyConnection, discard: Discard) -> None:
    indices = _new_to(db, discard, DeadLetterState.DISCARDED)
    db.execute(
        "UPDATE failed_requests SET state = 'discarded', discarded_at = ?, discard_reason = ?"
        f" WHERE batch_id = ? AND {_AMONG}",
        [rows.timestamp(discard.at), rows.text(discard.reason), discard.batch_id, indices],
    )
    insert_events(db, _events(discard, DeadLetterState.DISCARDED, indices, discard.reason))


def _begin(db: duckdb.DuckDBPyConnection, replay: Replay) -> None:
    indices = _new_to(db, replay, DeadLetterState.REPLAYING)
    db.execute(
        "UPDATE failed_requests SET state = 'replaying', replay = ?"
        f" WHERE batch_id = ? AND {_AMONG}",
        [replay.number, replay.batch_id, indices],
    )
    overrides = msgspec.json.encode(replay.overrides).decode()
    insert_events(db, _events(replay, DeadLetterState.REPLAYING, indices, overrides))


def _release(db: duckdb.DuckDBPyConnection, replay: Replay) -> None:
    """Set dead letters without an outcome from a closed replay back to `dead`."""
    if replay.closed_at is None:
        return
    indices = _held(db, replay)
    db.execute(
        f"UPDATE failed_requests SET state = 'dead' WHERE batch_id = ? AND {_AMONG}",
        [replay.batch_id, indices],
    )
    reason = "the replay was closed before it had an outcome"
    closed = msgspec.structs.replace(replay, at=replay.closed_at)
    insert_events(db, _events(closed, DeadLetterState.DEAD, indices, reason))


def _held(db: duckdb.DuckDBPyConnection, replay: Replay) -> list[int]:
    found = db.execute(
        "SELECT request_index FROM failed_requests"
        " WHERE batch_id = ? AND replay = ? AND state = 'replaying' ORDER BY request_index",
        [replay.batch_id, replay.number],
    ).fetchall()
    return [index for (index,) in found]


def _settle(
    db: duckdb.DuckDBPyConnection,
    replay: Replay,
    arrived: dict[int, JournalEntry],
    budget: rows.RowBudget,
) -> set[int]:
    """Apply outcomes to the dead letters that a replay holds; return the changed chunks."""
    where = f"WHERE batch_id = ? AND replay = ? AND state = 'replaying' AND {_AMONG}"
    key = [replay.batch_id, replay.number, list(arrived)]
    answers: list[rows.Row] = []
    resolved: list[rows.Row] = []
    failed: list[rows.Row] = []
    letters = rows.select(db, "failed_requests", WITHOUT_TEXTS, where, key)
    for letter in letters:
        request = _replayed(rows.settled_request(letter), arrived[letter["request_index"]])
        if isinstance(request.outcome, Completion):
            result = rows.result_row(replay.batch_id, letter["chunk"], request, request.outcome)
            answers.append(budget.fit(result, request))
            resolved.append(_resolved(letter, answers[-1], replay))
        else:
            row = rows.failed_row(replay.batch_id, letter["chunk"], request, request.outcome)
            again = new_letter(budget.fit(row, request))
            failed.append({**again, "first_failed_at": letter["first_failed_at"]})
    rows.insert(db, "results", answers)
    rows.update(db, "failed_requests", resolved, _RESOLVED)
    rows.update(db, "failed_requests", failed, {*failed[0]} - {"body"} if failed else ())
    insert_events(db, [*resolved, *(dead_event(row, replay.number) for row in failed)])
    return {letter["chunk"] for letter in letters}


def _resolved(letter: rows.Row, answer: rows.Row, replay: Replay) -> rows.Row:
    """Return a dead letter that a replay has answered, with the columns of its event."""
    return {
        **letter,
        "state": str(DeadLetterState.RESOLVED),
        "resolved_at": answer["settled_at"],
        "happened_at": answer["settled_at"],
        "actor": answer["run_id"],
        "operation": replay.number,
        "code": None,
        "reason": "answered",
        "engine": answer["engine"],
        "settings_hash": answer["settings_hash"],
    }


def _replayed(before: SettledRequest, entry: JournalEntry) -> SettledRequest:
    replayed = msgspec.structs.replace(
        before,
        outcome=entry.outcome,
        attempts=entry.attempts,
        failed_attempts=entry.failed_attempts,
        settled_at=entry.settled_at,
        provenance=entry.provenance,
        place=entry.place,
    )
    return after_replay(before, replayed)


def _events(
    operation: Operation, state: DeadLetterState, indices: Iterable[int], reason: str
) -> list[rows.Row]:
    return [
        {
            "batch_id": operation.batch_id,
            "request_index": index,
            "happened_at": operation.at,
            "state": str(state),
            "actor": rows.text(operation.actor),
            "operation": operation.number,
            "code": None,
            "reason": rows.text(reason),
            "engine": "",
            "settings_hash": "",
        }
        for index in indices
    ]
