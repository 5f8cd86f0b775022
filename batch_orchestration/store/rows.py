"""Conversion between core values and rows of the store; DataFrames are used in `store/` only.

In a row, times are POSIX seconds; `insert`, `update` and `select` convert them.
"""

import contextlib
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import msgspec

from batch_orchestration.core.batches import BatchOptions, BatchPlan, BatchStatus
from batch_orchestration.core.outcomes import Completion, Failure, Outcome, Usage, unicode_text
from batch_orchestration.core.requests import LARGEST_KEPT_BODY
from batch_orchestration.core.results import (
    Attempt,
    BatchRecord,
    ChunkReport,
    Place,
    Provenance,
    SettledRequest,
)
from batch_orchestration.files.atomic import disk_errors
from batch_orchestration.files.journal_records import record_at

Row = dict[str, Any]
_S = TypeVar("_S", bound=msgspec.Struct)

#: Limits on the bytes of responses and bodies in one transaction, and in one row. DuckDB uses about
#: five times the memory of a transaction and of the row group rewritten by its commit. A row group
#: has 2,048 rows (`connection.ROW_GROUP`), thus 48 MiB. Measured in `benchmarks/memory.md`.
BUDGET_BYTES = 16 * 2**20
LARGEST_BYTES = LARGEST_KEPT_BODY

#: Types of DataFrame columns by DuckDB's, because pandas cannot infer the type of a column of None.
_DTYPES = {
    "VARCHAR": "object",
    "INTEGER": "Int64",
    "BIGINT": "Int64",
    "DOUBLE": "Float64",
    "BOOLEAN": "boolean",
    "TIMESTAMP": "datetime64[us]",
}
_KEY = ("batch_id", "request_index")

decode_attempts = msgspec.json.Decoder(tuple[Attempt, ...]).decode


def insert(db: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Row], rest: str = "") -> None:
    """Insert rows in bulk, all with the same columns; those that the table lacks are left out.

    Args:
        rest: The end of the statement, such as a filter of the rows.
    """
    if rows:
        with _incoming(db, table, rows, rows[0]) as columns:
            names = ", ".join(columns)
            db.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM incoming {rest}")


def update(
    db: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Row], columns: Iterable[str]
) -> None:
    """Set columns of requests in bulk; their other columns, such as large texts, stay unwritten."""
    if rows:
        with _incoming(db, table, rows, {*_KEY, *columns}) as names:
            changes = ", ".join(f"{name} = incoming.{name}" for name in names if name not in _KEY)
            same = " AND ".join(f"{table}.{name} = incoming.{name}" for name in _KEY)
            db.execute(f"UPDATE {table} SET {changes} FROM incoming WHERE {same}")


@contextlib.contextmanager
def _incoming(
    db: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Row], columns: Container[str]
) -> Iterator[list[str]]:
    """Register the rows as `incoming`; yield the columns that they share with the table."""
    # Imported here, because it takes half a second, needless for commands that only read.
    import pandas as pd

    frame = {
        name: pd.Series([_stored(row[name], kind) for row in rows], dtype=_DTYPES[kind])
        for name, kind, *_ in db.execute(f"DESCRIBE {table}").fetchall()
        if name in columns
    }
    db.register("incoming", pd.DataFrame(frame))
    try:
        yield [*frame]
    finally:
        db.unregister("incoming")


def _stored(value: Any, kind: str) -> Any:
    return timestamp(value) if kind == "TIMESTAMP" and value is not None else value


def select(
    db: duckdb.DuckDBPyConnection,
    table: str,
    columns: Iterable[str],
    rest: str,
    parameters: Sequence[Any] = (),
) -> list[Row]:
    """Return the rows of `SELECT columns FROM table rest`, by column name."""
    found = db.execute(f"SELECT {', '.join(columns)} FROM {table} {rest}", [*parameters])
    names = [column[0] for column in found.description or ()]
    return [dict(zip(names, map(_loaded, row), strict=True)) for row in found.fetchall()]


def _loaded(value: Any) -> Any:
    return value.replace(tzinfo=UTC).timestamp() if isinstance(value, datetime) else value


def timestamp(at: float) -> datetime:
    """Return POSIX seconds in the store's format: UTC, without a time zone."""
    return datetime.fromtimestamp(at, UTC).replace(tzinfo=None)


def text(value: bytes | str) -> str:
    """Return text that the store can hold: anything that is not Unicode is replaced."""
    return unicode_text(value) if isinstance(value, str) else value.decode(errors="replace")


def result_row(batch_id: str, number: int, request: SettledRequest, answer: Completion) -> Row:
    """Return the row of `results` for an answered request."""
    return {
        **_request_columns(batch_id, number, request),
        "http_status": answer.status,
        "response": text(bytes(answer.body)),
        "response_at": None,
        "request_id": _text_or_null(answer.request_id),
        "finish_reason": _text_or_null(answer.finish_reason),
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        "latency_seconds": answer.latency_seconds,
    }


def failed_row(batch_id: str, number: int, request: SettledRequest, failure: Failure) -> Row:
    """Return the row of `failed_requests` for a failed request, without the dead letter's state."""
    return {
        **_request_columns(batch_id, number, request),
        "code": str(failure.code),
        "message": text(failure.message),
        "http_status": failure.status,
        "response": None if failure.body is None else text(bytes(failure.body)),
        "response_at": None,
        "request_id": _text_or_null(failure.request_id),
        "latency_seconds": failure.latency_seconds,
        "body": text(request.body) or None,
    }


class RowBudget:
    """Limits the bytes of responses and bodies in the rows of one transaction.

    DuckDB uses several times the memory of the texts in a transaction, and no setting prevents it.
    A row that exceeds the budget is stored without response and body: `response_at` refers to the
    response in the journal below `root`, and the body remains in the kept input.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._left = BUDGET_BYTES
        self._journals: set[Path] = set()

    def fit(self, row: Row, request: SettledRequest) -> Row:
        """Return the row to store for a request, and charge the budget for it."""
        answer = 0 if request.outcome.body is None else len(request.outcome.body)
        size = answer + (len(request.body) if "body" in row else 0)
        if size <= min(self._left, LARGEST_BYTES):
            self._left -= size
            return row
        changes: Row = {"body": None} if "body" in row else {}
        if request.place is not None and answer:
            changes |= {"response": None, "response_at": _place_name(request.place, self._root)}
            self._journals.add(request.place.journal)
        return {**row, **changes}

    def sync(self) -> None:
        """Flush the journals that rows refer to, to make them as durable as the rows.

        Raises:
            Shortage: No space or no descriptor is left; the rows must not be stored.
            StorageError: A journal cannot be flushed.
        """
        for journal in self._journals:
            with disk_errors(journal):
                descriptor = os.open(journal, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fdatasync(descriptor)
                finally:
                    os.close(descriptor)


def with_response(row: Row, root: Path) -> Row:
    """Return a row with the engine's response, read from the journal if the store lacks it.

    Raises:
        FileDamaged: The response is no longer in the journal.
    """
    if row["response_at"] is None:
        return row
    outcome = record_at(_place(row["response_at"], root), row["request_index"]).outcome
    return {**row, "response": None if outcome.body is None else text(bytes(outcome.body))}


def _place_name(place: Place, root: Path) -> str:
    return f"{place.journal.relative_to(root)}:{place.start}+{place.size_bytes}"


def _place(name: str, root: Path) -> Place:
    journal, _, extent = name.rpartition(":")
    start, size = extent.split("+")
    return Place(root / journal, int(start), int(size))


def _text_or_null(value: str | None) -> str | None:
    return None if value is None else text(value)


def _request_columns(batch_id: str, number: int, request: SettledRequest) -> Row:
    return {
        "batch_id": batch_id,
        "chunk": number,
        "request_index": request.index,
        "line": request.line,
        "custom_id": _text_or_null(request.custom_id),
        "endpoint": text(request.endpoint),
        "attempts": request.attempts,
        "failed_attempts": text(msgspec.json.encode(request.failed_attempts)),
        "settled_at": request.settled_at,
        **{name: text(value) for name, value in msgspec.structs.asdict(request.provenance).items()},
    }


def struct_of(kind: type[_S], row: Row, **others: Any) -> _S:
    """Return a struct from the columns named like its fields; `others` are the other fields."""
    return msgspec.convert({**row, **others}, kind)


def settled_request(row: Row) -> SettledRequest:
    """Return the request in a row of `results` or `failed_requests`."""
    return struct_of(
        SettledRequest,
        row,
        index=row["request_index"],
        body=(row.get("body") or "").encode(),
        outcome=_outcome(row),
        failed_attempts=decode_attempts(row["failed_attempts"]),
        provenance=struct_of(Provenance, row),
    )


def as_stored(batch_id: str, number: int, request: SettledRequest) -> SettledRequest:
    """Return a request as the store would return it after its chunk's commit."""
    if isinstance(request.outcome, Completion):
        return settled_request(result_row(batch_id, number, request, request.outcome))
    return settled_request(failed_row(batch_id, number, request, request.outcome))


def _outcome(row: Row) -> Outcome:
    response = row.get("response")
    body = None if response is None else msgspec.Raw(response.encode())
    if "code" in row:
        failure = struct_of(Failure, row, status=row["http_status"], body=None)
        # msgspec cannot convert an optional Raw.
        return msgspec.structs.replace(failure, body=body)
    usage = struct_of(Usage, row)
    return struct_of(Completion, row, status=row["http_status"], body=body, usage=usage)


_BATCH_FIGURES = (
    *("chunks_committed", "completed", "failed"),
    *("prompt_tokens", "completion_tokens"),
)


def batch_row(plan: BatchPlan, at: float) -> Row:
    """Return the row of `batches` for a batch that was just admitted, its times as timestamps."""
    same = ("batch_id", "identity", "sha256", "size_bytes", "requests", "faulty")
    return {
        **{name: getattr(plan, name) for name in same},
        "file_name": text(plan.file_name),
        "chunks": len(plan.chunks),
        "requests_per_chunk": plan.requests_per_chunk,
        "model": text(str(plan.settings.get("model", ""))),
        "priority": plan.options.priority,
        "options": text(msgspec.json.encode(plan.options)),
        "settings": text(msgspec.json.encode(plan.settings)),
        "settings_hash": plan.settings_hash,
        "status": str(BatchStatus.IN_PROGRESS),
        "created_at": timestamp(plan.created_at),
        "in_progress_at": timestamp(at),
        **dict.fromkeys(_BATCH_FIGURES, 0),
    }


#: Column with the time at which a batch reached a status.
STATUS_TIMES = {
    status: "created_at" if status is BatchStatus.VALIDATING else f"{status}_at"
    for status in BatchStatus
}
#: Columns of `batches` that make up a `BatchRecord`.
BATCHES = (
    *(name for name in BatchRecord.__struct_fields__ if name not in {"total", "times"}),
    *("requests", *STATUS_TIMES.values()),
)
#: Columns of `chunks` that make up a `ChunkReport`.
CHUNK_REPORTS = (
    *(name for name in ChunkReport.__struct_fields__ if name != "number"),
    "chunk",
)


def status_times(row: Row) -> dict[str, float]:
    """Return the time at which each status was reached, by status word."""
    return {
        str(status): row[column]
        for status, column in STATUS_TIMES.items()
        if row[column] is not None
    }


def batch_record(row: Row) -> BatchRecord:
    """Return the batch in a row of `batches`."""
    options = msgspec.json.decode(row["options"], type=BatchOptions)
    return struct_of(
        BatchRecord, row, total=row["requests"], options=options, times=status_times(row)
    )


def chunk_report(row: Row) -> ChunkReport:
    """Return the figures in a row of `chunks` for a committed chunk."""
    by_code = msgspec.json.decode(row["failures_by_code"])
    return struct_of(ChunkReport, row, number=row["chunk"], failures_by_code=by_code)
