"""Conversion between core values and rows of the store; DataFrames are used in `store/` only."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from batch_orchestration.core.batches import BatchOptions, BatchPlan, BatchStatus
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Usage, unicode_text
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

#: Limits on the bytes of responses and bodies in one transaction, and in one row. DuckDB uses about
#: five times the memory of a transaction and of the row group rewritten by its commit. A row group
#: has 2,048 rows (`connection.ROW_GROUP`), thus 48 MiB. Measured in `benchmarks/memory.md`.
BUDGET_BYTES = 16 * 2**20
LARGEST_BYTES = LARGEST_KEPT_BODY

# Types of DataFrame columns; explicit, because pandas cannot infer the type of a column of None.
_TEXT = "object"
_INTEGER = "int64"
_INTEGER_OR_NULL = "Int64"
_REAL = "float64"
_TIME = "datetime64[us]"

_REQUEST = {
    "batch_id": _TEXT,
    "chunk": _INTEGER,
    "request_index": _INTEGER,
    "line": _INTEGER,
    "custom_id": _TEXT,
    "endpoint": _TEXT,
}
_HISTORY = {
    "attempts": _INTEGER,
    "failed_attempts": _TEXT,
    "settled_at": _TIME,
    "run_id": _TEXT,
    "engine": _TEXT,
    "engine_version": _TEXT,
    "model": _TEXT,
    "settings_hash": _TEXT,
}
#: Columns of `results`, with their types.
RESULTS = {
    **_REQUEST,
    "http_status": _INTEGER,
    "response": _TEXT,
    "response_at": _TEXT,
    "request_id": _TEXT,
    "finish_reason": _TEXT,
    "prompt_tokens": _INTEGER,
    "completion_tokens": _INTEGER,
    "latency_seconds": _REAL,
    **_HISTORY,
}
#: Columns of `failed_requests`, with their types.
FAILED_REQUESTS = {
    **_REQUEST,
    "code": _TEXT,
    "message": _TEXT,
    "http_status": _INTEGER_OR_NULL,
    "response": _TEXT,
    "response_at": _TEXT,
    "request_id": _TEXT,
    "latency_seconds": _REAL,
    "body": _TEXT,
    **_HISTORY,
}
#: Columns of `chunks` that are known at admission, with their types.
PLANNED_CHUNKS = {
    "batch_id": _TEXT,
    "chunk": _INTEGER,
    "first_index": _INTEGER,
    "requests": _INTEGER,
    "status": _TEXT,
}

decode_attempts = msgspec.json.Decoder(tuple[Attempt, ...]).decode


def insert(
    connection: duckdb.DuckDBPyConnection, table: str, columns: dict[str, str],
    rows: Sequence[Row], rest: str = "",
) -> None:  # fmt: skip
    """Insert rows in bulk, each with every column; `rest` may end the statement with a filter."""
    if not rows:
        return
    # Imported here, because it takes half a second, needless for commands that only read.
    import pandas as pd

    frame = pd.DataFrame(
        {
            name: pd.Series([row[name] for row in rows], dtype=dtype)
            for name, dtype in columns.items()
        }
    )
    names = ", ".join(columns)
    connection.register("incoming", frame)
    connection.execute(f"INSERT INTO {table} ({names}) SELECT {names} FROM incoming {rest}")
    connection.unregister("incoming")


def select(
    connection: duckdb.DuckDBPyConnection,
    table: str,
    columns: Sequence[str],
    rest: str,
    parameters: Sequence[Any] = (),
) -> list[Row]:
    """Return the rows of `SELECT columns FROM table rest`, by column name."""
    rows = connection.execute(
        f"SELECT {', '.join(columns)} FROM {table} {rest}", list(parameters)
    ).fetchall()
    return [dict(zip(columns, row, strict=True)) for row in rows]


def timestamp(at: float) -> datetime:
    """Return POSIX seconds in the store's format: UTC, without a time zone."""
    return datetime.fromtimestamp(at, UTC).replace(tzinfo=None)


def posix_seconds(moment: datetime) -> float:
    """Return a timestamp of the store as POSIX seconds: the inverse of `timestamp`, to 1 µs."""
    return moment.replace(tzinfo=UTC).timestamp()


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
        "settled_at": timestamp(request.settled_at),
        **{name: text(value) for name, value in msgspec.structs.asdict(request.provenance).items()},
    }


def settled_request(row: Row) -> SettledRequest:
    """Return the request in a row of `results` or `failed_requests`."""
    return SettledRequest(
        index=row["request_index"],
        line=row["line"],
        custom_id=row["custom_id"],
        endpoint=row["endpoint"],
        body=(row.get("body") or "").encode(),
        outcome=_failure(row) if "code" in row else _completion(row),
        attempts=row["attempts"],
        failed_attempts=decode_attempts(row["failed_attempts"]),
        settled_at=posix_seconds(row["settled_at"]),
        provenance=Provenance(**{name: row[name] for name in Provenance.__struct_fields__}),
    )


def as_stored(batch_id: str, number: int, request: SettledRequest) -> SettledRequest:
    """Return a request as the store would return it after its chunk's commit."""
    if isinstance(request.outcome, Completion):
        return settled_request(result_row(batch_id, number, request, request.outcome))
    return settled_request(failed_row(batch_id, number, request, request.outcome))


def _completion(row: Row) -> Completion:
    return Completion(
        status=row["http_status"],
        body=msgspec.Raw(row["response"].encode()),
        request_id=row["request_id"],
        finish_reason=row["finish_reason"],
        usage=Usage(prompt_tokens=row["prompt_tokens"], completion_tokens=row["completion_tokens"]),
        latency_seconds=row["latency_seconds"],
    )


def _failure(row: Row) -> Failure:
    return Failure(
        code=FailureCode(row["code"]),
        message=row["message"],
        status=row["http_status"],
        body=None if row["response"] is None else msgspec.Raw(row["response"].encode()),
        request_id=row["request_id"],
        latency_seconds=row["latency_seconds"],
    )


def batch_row(plan: BatchPlan, at: float) -> Row:
    """Return the row of `batches` for a batch that was just admitted."""
    return {
        "batch_id": plan.batch_id,
        "identity": plan.identity,
        "file_name": text(plan.file_name),
        "sha256": plan.sha256,
        "size_bytes": plan.size_bytes,
        "requests": plan.requests,
        "faulty": plan.faulty,
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


_BATCH_FIGURES = (
    "chunks_committed",
    "completed",
    "failed",
    "prompt_tokens",
    "completion_tokens",
)
#: Column with the time at which a batch reached a status.
STATUS_TIMES = {
    status: "created_at" if status is BatchStatus.VALIDATING else f"{status}_at"
    for status in BatchStatus
}
#: Columns of `batches` that make up a `BatchRecord`.
BATCHES = (
    *("batch_id", "file_name", "identity", "status", "requests", "chunks"),
    *(
        "requests_per_chunk",
        "options",
        "settings_hash",
        "model",
        *_BATCH_FIGURES,
        *STATUS_TIMES.values(),
    ),
)


def status_times(row: Row) -> dict[str, float]:
    """Return the time at which each status was reached, by status word."""
    return {
        str(status): posix_seconds(row[column])
        for status, column in STATUS_TIMES.items()
        if row[column] is not None
    }


def batch_record(row: Row) -> BatchRecord:
    """Return the batch in a row of `batches`."""
    return BatchRecord(
        batch_id=row["batch_id"],
        file_name=row["file_name"],
        identity=row["identity"],
        status=BatchStatus(row["status"]),
        total=row["requests"],
        chunks=row["chunks"],
        requests_per_chunk=row["requests_per_chunk"],
        options=msgspec.json.decode(row["options"], type=BatchOptions),
        settings_hash=row["settings_hash"],
        model=row["model"],
        times=status_times(row),
        **{name: row[name] for name in _BATCH_FIGURES},
    )


#: Columns of `chunks` that make up a `ChunkReport`.
CHUNK_REPORTS = (
    *("batch_id", "chunk", "requests", "completed", "failed", "prompt_tokens"),
    *("completion_tokens", "attempts", "seconds", "committed_at", "run_id", "failures_by_code"),
    "memory_level",
)


def chunk_report(row: Row) -> ChunkReport:
    """Return the figures in a row of `chunks` for a committed chunk."""
    return ChunkReport(
        **{
            **{name: value for name, value in row.items() if name != "chunk"},
            "number": row["chunk"],
            "committed_at": posix_seconds(row["committed_at"]),
            "failures_by_code": msgspec.json.decode(row["failures_by_code"], type=dict[str, int]),
        }
    )
