"""What was done to dead letters, applied to the store.

Every change is idempotent, and for each dead letter its operations are applied in their order: so
the queue can be brought up to date at any time from the operations that are kept as files.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import duckdb
import msgspec

from batch_orchestration.core.dead_letters import (
    DeadLetterState,
    Discard,
    Operation,
    Replay,
    after_replay,
)
from batch_orchestration.core.outcomes import Completion
from batch_orchestration.core.results import SettledRequest
from batch_orchestration.files.journal_reading import JournalEntry
from batch_orchestration.storage import rows
from batch_orchestration.storage.letters import LETTERS, dead_event, insert_events, insert_letters

#: Indices come as one parameter, a list: there may be very many.
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
    """Bring the queue of a batch up to date; return the numbers of the chunks that changed."""
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
    """Yield entries by index, not too many at a time: with each comes the row of its letter."""
    left = iter(entries)
    while some := {entry.index: entry for entry in islice(left, _ENTRIES_AT_A_TIME)}:
        yield some


def _new_to(
    db: duckdb.DuckDBPyConnection, operation: Operation, state: DeadLetterState
) -> list[int]:
    """Return the dead letters that the operation is about and that do not know of it yet."""
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
    """Let go of what a closed replay did not answer."""
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
    """Give held dead letters the outcomes that there are; return the chunks they are of."""
    where = f"WHERE batch_id = ? AND replay = ? AND state = 'replaying' AND {_AMONG}"
    key = [replay.batch_id, replay.number, list(arrived)]
    letters = rows.select(db, "failed_requests", [*LETTERS], where, key)
    answered: list[rows.Row] = []
    events: list[rows.Row] = []
    settled: list[rows.Row] = []
    for letter in letters:
        request = _replayed(rows.settled_request(letter), arrived[letter["request_index"]])
        if isinstance(request.outcome, Completion):
            result = rows.result_row(replay.batch_id, letter["chunk"], request, request.outcome)
            answered.append(budget.fit(result, request))
            moment = rows.timestamp(request.settled_at)
            settled.append({**letter, "state": "resolved", "resolved_at": moment})
            events.append(_answered_event(replay, request))
        else:
            row = rows.failed_row(replay.batch_id, letter["chunk"], request, request.outcome)
            failed = {**letter, **budget.fit(row, request), "body": letter["body"]}
            settled.append({**failed, "state": "dead", "last_failed_at": failed["settled_at"]})
            events.append(dead_event(settled[-1], replay.number))
    db.execute(f"DELETE FROM failed_requests {where}", key)
    insert_letters(db, settled)
    rows.insert(db, "results", rows.RESULTS, answered)
    insert_events(db, events)
    return {letter["chunk"] for letter in letters}


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


def _answered_event(replay: Replay, request: SettledRequest) -> rows.Row:
    return {
        "batch_id": replay.batch_id,
        "request_index": request.index,
        "happened_at": rows.timestamp(request.settled_at),
        "state": str(DeadLetterState.RESOLVED),
        "actor": rows.text(request.provenance.run_id),
        "operation": replay.number,
        "code": None,
        "reason": "answered",
        "engine": rows.text(request.provenance.engine),
        "settings_hash": rows.text(request.provenance.settings_hash),
    }


def _events(
    operation: Operation, state: DeadLetterState, indices: Iterable[int], reason: str
) -> list[rows.Row]:
    return [
        {
            "batch_id": operation.batch_id,
            "request_index": index,
            "happened_at": rows.timestamp(operation.at),
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
