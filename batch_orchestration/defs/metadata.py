"""Metadata of Dagster's events, made from values of the wings."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import dagster as dg

Metadata = dict[str, dg.MetadataValue | str | int | float | bool]

ROW_COUNT = "dagster/partition_row_count"
#: Decimal places: enough for rates of millionths, and for microseconds.
_DIGITS = 6


def metadata_of(source: object = None, *fields: str, **further: object) -> Metadata:
    """Return fields of a value, and further values, as metadata.

    A number stays one, because the UI plots numbers. A path is shown as one, a mapping as JSON. A
    value that is None or empty has no entry.
    """
    values = {name: getattr(source, name) for name in fields} | further
    return {name: _shown(value) for name, value in values.items() if value not in (None, "", {})}


def _shown(value: object) -> dg.MetadataValue | str | int | float | bool:
    if isinstance(value, dg.MetadataValue | bool | int):
        return value
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, Path):
        return dg.MetadataValue.path(value)
    return dg.MetadataValue.json(dict(value)) if isinstance(value, Mapping) else str(value)


def table_of(rows: Iterable[object], *columns: str) -> dg.MetadataValue | None:
    """Return a table with these fields of each row, None as an empty cell; None without rows."""
    return _table({name: _cell(getattr(row, name)) for name in columns} for row in rows)


def counts_table(counts: Mapping[str, int]) -> dg.MetadataValue | None:
    """Return failures by code as a table, the most frequent first; None without failures."""
    rows = sorted(counts.items(), key=lambda item: -item[1])
    return _table({"code": code, "requests": count} for code, count in rows)


def _table(rows: Iterable[dict[str, str | int | float | bool]]) -> dg.MetadataValue | None:
    # Dagster cannot infer the columns of a table without rows.
    records = [dg.TableRecord(row) for row in rows]
    return dg.MetadataValue.table(records) if records else None


def _cell(value: object) -> str | int | float | bool:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, int):
        return value
    return "" if value is None else str(value)


def list_of(lines: Iterable[str]) -> dg.MetadataValue | None:
    """Return lines as a Markdown list; None without lines."""
    text = "\n".join(f"- {line}" for line in lines)
    return dg.MetadataValue.md(text) if text else None
