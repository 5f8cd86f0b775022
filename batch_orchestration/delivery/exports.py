"""Exports: one flat row per request, as CSV or Parquet written by DuckDB's own COPY."""

import base64
import binascii
import tempfile
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

import duckdb
import msgspec

from batch_orchestration.core import foreign_json
from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.outcomes import Completion
from batch_orchestration.core.results import SIMULATED, SettledRequest
from batch_orchestration.files.atomic import disk_errors

#: An embedding may be encoded as base64 of 32-bit floats.
_FLOAT_BYTES = 4
#: Fields of a response that list its choices: text, or embeddings.
_CHOICES = ("choices", "data")
#: DuckDB's types of the fields.
_SQL_TYPES = {str: "VARCHAR", int: "BIGINT", float: "DOUBLE", bool: "BOOLEAN"}
#: Lower bound of `maximum_object_size`; DuckDB's buffer holds two rows of that length.
_LEAST_ROW_BYTES = 2**20
#: Text that spreadsheets run as a formula: also after blanks, also with full-width signs.
_FORMULA = r"^(\t|\r|\n|\s*[=+\-@\x{FF1D}\x{FF0B}\x{FF0D}\x{FF20}])"
_NUMBER = r"[+-]?[0-9]+([.,][0-9]+)*([eE][+-]?[0-9]+)?"


class TableFormat(StrEnum):
    """A file format for tables."""

    CSV = "csv"
    PARQUET = "parquet"


class FlatOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One request with its outcome, in the order of the columns.

    Attributes:
        index: Position in the batch, from 0.
        line: Line number in the file, from 1.
        status: `completed` or `failed`.
        code: Failure code; None for an answer, like `message`.
        choices: Number of choices in the answer, for `n`, a list of prompts or a list of texts to
            embed. The following columns describe the first choice.
        text: None if the first choice has no text (a tool call, an embedding).
        embedding_length: Numbers in the first embedding; None for other answers.
        prompt_tokens: None for a failure, like `completion_tokens`.
        attempts: Number of submissions; 0 if the request was rejected at admission.
        engine: Kind of engine; empty if none was asked.
        simulated: Whether the simulated engine made up the answer.
    """

    custom_id: str | None
    index: int
    line: int
    status: str
    code: str | None = None
    message: str | None = None
    choices: int | None = None
    text: str | None = None
    embedding_length: int | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_seconds: float
    attempts: int
    engine: str
    model: str
    simulated: bool


def flat_outcome(request: SettledRequest) -> FlatOutcome:
    """Return the flat row of a settled request."""
    outcome, by = request.outcome, request.provenance
    flat = FlatOutcome(
        custom_id=request.custom_id,
        index=request.index,
        line=request.line,
        status="completed",
        latency_seconds=outcome.latency_seconds,
        attempts=request.attempts,
        engine=by.engine,
        model=by.model,
        simulated=by.engine == SIMULATED,
    )
    if not isinstance(outcome, Completion):
        return msgspec.structs.replace(
            flat, status="failed", code=str(outcome.code), message=outcome.message
        )
    answer = _decoded(outcome.body)
    return msgspec.structs.replace(
        flat,
        choices=_choices(answer),
        text=_text(answer),
        embedding_length=_embedding_length(answer),
        finish_reason=outcome.finish_reason,
        prompt_tokens=outcome.usage.prompt_tokens,
        completion_tokens=outcome.usage.completion_tokens,
    )


def _decoded(body: msgspec.Raw) -> object:
    try:
        return foreign_json.decode(body)
    except foreign_json.BadJson:
        return None


def _first(answer: object, field: str) -> Mapping[str, Any]:
    items = answer.get(field) if isinstance(answer, dict) else None
    first = items[0] if isinstance(items, list) and items else None
    return first if isinstance(first, dict) else {}


def _choices(answer: object) -> int | None:
    items = [answer.get(field) for field in _CHOICES] if isinstance(answer, dict) else []
    return next((len(each) for each in items if isinstance(each, list)), None)


def _text(answer: object) -> str | None:
    choice = _first(answer, "choices")
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return text if isinstance(text, str) else None


def _embedding_length(answer: object) -> int | None:
    embedding = _first(answer, "data").get("embedding")
    if isinstance(embedding, list):
        return len(embedding)
    if isinstance(embedding, str):
        try:
            return len(base64.b64decode(embedding, validate=True)) // _FLOAT_BYTES
        except binascii.Error:
            return None
    return None


def write_table(
    rows: Iterable[FlatOutcome],
    path: Path,
    kind: TableFormat,
    *,
    metadata: Mapping[str, str],
    raw: bool = False,
) -> None:
    """Write rows as a table, in their order; it appears at `path` whole or not at all.

    The rows are staged in a temporary file beside `path`, so memory use does not grow with them.

    Args:
        path: Replaced if it exists.
        kind: CSV gets a header row and an empty field for null.
        raw: Leave CSV text as it is; otherwise a `'` precedes text that a spreadsheet would run.
        metadata: Stored in the file's own metadata if the format has any (Parquet).

    Raises:
        Shortage: There is no room; `path` is unchanged.
        StorageError: The table cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:40]}.", dir=path.parent) as folder:
            lines, table = Path(folder) / "rows.jsonl", Path(folder) / "table"
            longest = _write_lines(rows, lines)
            harmless = kind is TableFormat.CSV and not raw
            size = max(longest, _LEAST_ROW_BYTES)
            source = _source(lines, max_row_bytes=size, harmless=harmless)
            _copy(source, table, kind, metadata)
            table.replace(path)


def _write_lines(rows: Iterable[FlatOutcome], path: Path) -> int:
    """Write each row as a line of JSON; return the length of the longest in bytes."""
    encode = msgspec.json.Encoder().encode
    longest = 0
    with path.open("wb") as file:
        for row in rows:
            longest = max(longest, file.write(encode(row) + b"\n"))
    return longest


def _source(lines: Path, *, max_row_bytes: int, harmless: bool) -> str:
    types = {field.name: _sql_type(field.type) for field in msgspec.structs.fields(FlatOutcome)}
    columns = ", ".join(f"{_quoted(name)}: '{sql_type}'" for name, sql_type in types.items())
    texts = [name for name, sql_type in types.items() if sql_type == "VARCHAR" and harmless]
    changed = ", ".join(f'{_harmless(name)} AS "{name}"' for name in texts)
    chosen = f"* REPLACE ({changed})" if changed else "*"
    return (
        f"SELECT {chosen} FROM read_json({_quoted(str(lines))}, format = 'newline_delimited',"
        f" columns = {{{columns}}}, maximum_object_size = {max_row_bytes})"
    )


def _sql_type(hint: Any) -> str:
    """Return DuckDB's type of a field that may be None."""
    return next(_SQL_TYPES[each] for each in get_args(hint) or (hint,) if each in _SQL_TYPES)


def _harmless(column: str) -> str:
    """Return SQL that puts a `'` before text that a spreadsheet would run, except numbers."""
    runs = f'regexp_matches("{column}", {_quoted(_FORMULA)})'
    number = f'regexp_full_match("{column}", {_quoted(_NUMBER)})'
    quote = _quoted("'")
    return f'CASE WHEN {runs} AND NOT {number} THEN {quote} || "{column}" ELSE "{column}" END'


def _copy(source: str, table: Path, kind: TableFormat, metadata: Mapping[str, str]) -> None:
    options = "FORMAT csv, HEADER"
    if kind is TableFormat.PARQUET:
        pairs = ", ".join(f"{name}: {_quoted(value)}" for name, value in metadata.items())
        options = f"FORMAT parquet, COMPRESSION zstd, KV_METADATA {{{pairs}}}"
    try:
        # One thread: buffers are per thread, and the CPUs belong to the engine.
        with duckdb.connect(config={"threads": 1}) as connection:
            connection.execute(f"COPY ({source}) TO {_quoted(str(table))} ({options})")
    except duckdb.Error as error:
        raise StorageError(f"the table could not be written: {str(error).strip()}") from error


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
