"""Exports: tables of flat rows as CSV or Parquet, written by DuckDB's own COPY."""

import tempfile
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

import duckdb
import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.delivery.lines import FlatOutcome
from batch_orchestration.files.atomic import disk_errors

#: Columns of a table, with their DuckDB types.
COLUMNS = {
    "custom_id": "VARCHAR",
    "index": "BIGINT",
    "line": "BIGINT",
    "status": "VARCHAR",
    "code": "VARCHAR",
    "message": "VARCHAR",
    "choices": "BIGINT",
    "text": "VARCHAR",
    "embedding_length": "BIGINT",
    "finish_reason": "VARCHAR",
    "prompt_tokens": "BIGINT",
    "completion_tokens": "BIGINT",
    "latency_seconds": "DOUBLE",
    "attempts": "BIGINT",
    "engine": "VARCHAR",
    "model": "VARCHAR",
    "simulated": "BOOLEAN",
}
#: Lower bound of `maximum_object_size`; DuckDB's buffer holds two rows of that length.
_LEAST_ROW_BYTES = 2**20


#: Text that spreadsheets run as a formula: also after blanks, also with full-width signs.
_FORMULA = r"^(\t|\r|\n|\s*[=+\-@\x{FF1D}\x{FF0B}\x{FF0D}\x{FF20}])"
_NUMBER = r"[+-]?[0-9]+([.,][0-9]+)*([eE][+-]?[0-9]+)?"


class TableFormat(StrEnum):
    """A file format for tables."""

    CSV = "csv"
    PARQUET = "parquet"


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
    columns = ", ".join(f"{_quoted(name)}: '{type_}'" for name, type_ in COLUMNS.items())
    texts = [name for name, type_ in COLUMNS.items() if type_ == "VARCHAR" and harmless]
    changed = ", ".join(f'{_harmless(name)} AS "{name}"' for name in texts)
    chosen = f"* REPLACE ({changed})" if changed else "*"
    return (
        f"SELECT {chosen} FROM read_json({_quoted(str(lines))}, format = 'newline_delimited',"
        f" columns = {{{columns}}}, maximum_object_size = {max_row_bytes})"
    )


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
