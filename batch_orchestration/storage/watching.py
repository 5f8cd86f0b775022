"""One look at the store for those who watch it: what has happened of late, and what is not well."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import FINAL
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.store import connection, rows, schema

#: What an early end left unasked failed at nothing.
_UNASKED = [str(FailureCode.BATCH_CANCELLED), str(FailureCode.BATCH_EXPIRED)]
_COUNTS = dict[str, dict[str, int]]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """A batch has ended.

    Attributes:
        number: Of the event in the batch's history.
        at: POSIX seconds.
        failures: By code, the most frequent first; what was left unasked is not counted.
        unasked: How many requests that is.
    """

    batch: BatchRecord
    number: int
    at: float
    status: BatchStatus
    actor: str
    reason: str
    failures: dict[str, int] = field(default_factory=dict)
    unasked: int = 0


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What one look has found.

    Attributes:
        endings: Since the time that was asked for, oldest first.
        unfinished: All batches that have not ended.
        dead_letters: Unresolved, by batch and code.
    """

    endings: tuple[Ending, ...] = ()
    unfinished: tuple[BatchRecord, ...] = ()
    dead_letters: _COUNTS = field(default_factory=dict)


def watch(path: Path, *, since: float, began: float, deadline_seconds: float) -> Watched:
    """Look at the store once, in one transaction.

    Args:
        path: Of its file; if there is none, nothing has happened.
        since: Endings later than that, POSIX seconds.
        began: Dead letters later than that.
        deadline_seconds: How long to wait for others to leave the file.

    Raises:
        StorageError: It cannot be read now.
    """
    if not path.exists():
        return Watched()
    schema.migrate(path, deadline_seconds=deadline_seconds)
    with connection.reading(path, deadline_seconds=deadline_seconds) as db:
        return Watched(
            endings=tuple(_endings(db, since)),
            unfinished=tuple(_batches(db, "status NOT IN (SELECT unnest(?))", _words(FINAL))),
            dead_letters=_counts(
                db,
                "state = 'dead' AND code NOT IN (SELECT unnest(?)) AND first_failed_at > ?",
                [_UNASKED, rows.timestamp(began)],
            ),
        )


def _endings(db: duckdb.DuckDBPyConnection, since: float) -> list[Ending]:
    ends = _words(FINAL - {BatchStatus.CANCELLED})
    events = rows.select(
        db,
        "batch_events",
        ["batch_id", "number", "happened_at", "to_status", "actor", "reason"],
        "WHERE happened_at > ? AND to_status IN (SELECT unnest(?)) ORDER BY happened_at, number",
        [rows.timestamp(since), ends],
    )
    ids = sorted({row["batch_id"] for row in events})
    if not ids:
        return []
    batches = {b.batch_id: b for b in _batches(db, "batch_id IN (SELECT unnest(?))", ids)}
    counts = _counts(db, "state <> 'resolved' AND batch_id IN (SELECT unnest(?))", [ids])
    return [
        Ending(
            batch=batches[row["batch_id"]],
            number=row["number"],
            at=rows.posix_seconds(row["happened_at"]),
            status=BatchStatus(row["to_status"]),
            actor=row["actor"],
            reason=row["reason"],
            failures={c: n for c, n in found.items() if c not in _UNASKED},
            unasked=sum(found.get(code, 0) for code in _UNASKED),
        )
        for row in events
        if row["batch_id"] in batches
        for found in (counts.get(row["batch_id"], {}),)
    ]


def _batches(
    db: duckdb.DuckDBPyConnection, condition: str, values: Sequence[str]
) -> list[BatchRecord]:
    found = rows.select(db, "batches", rows.BATCHES, f"WHERE {condition}", [list(values)])
    return [rows.batch_record(row) for row in found]


def _counts(db: duckdb.DuckDBPyConnection, condition: str, parameters: Sequence[Any]) -> _COUNTS:
    found = db.execute(
        f"SELECT batch_id, code, count(*) FROM failed_requests WHERE {condition}"
        " GROUP BY ALL ORDER BY count(*) DESC, code",
        list(parameters),
    ).fetchall()
    counts: _COUNTS = {}
    for batch_id, code, number in found:
        counts.setdefault(batch_id, {})[code] = number
    return counts


def _words(statuses: frozenset[BatchStatus]) -> list[str]:
    return sorted(map(str, statuses))
