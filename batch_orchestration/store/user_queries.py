"""SQL from users: one SELECT over the store, without access to files, network or settings."""

import contextlib
import re
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb

from batch_orchestration.core.errors import StorageError
from batch_orchestration.store.connection import reading

#: The order matters: each of the last two would block the settings after it.
_CONFINED = (
    "SET memory_limit = '1GiB'",
    "SET threads = 2",
    # Queries that do not fit into memory fail instead of spilling to the journals' disk.
    "SET temp_directory = ''",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET allow_community_extensions = false",
    # Otherwise, DuckDB resolves unknown table names to variables of this program.
    "SET python_enable_replacements = false",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)
#: Memory for a query in addition to the memory that the process has allocated. DuckDB's own limit
#: covers its buffers only, and not, for example, one long string.
MOST_MEMORY_BYTES = 2 * 2**30
#: Commits of running batches wait while a query reads the store.
MOST_SECONDS = 60.0
MOST_ROWS = 100_000
MOST_BYTES = 64 * 2**20
_ROWS_AT_A_TIME = 100

Answer = tuple[list[str], list[tuple[Any, ...]]]


def ask(
    path: Path,
    sql: str,
    *,
    deadline_seconds: float,
    most_seconds: float = MOST_SECONDS,
    most_rows: int = MOST_ROWS,
    most_bytes: int = MOST_BYTES,
) -> Answer:
    """Return column names and rows of one SELECT.

    Args:
        path: The store's file; opened read-only.
        sql: One statement: a SELECT, or one that shows tables or columns.
        deadline_seconds: Longest wait for writers to leave the store.
        most_seconds: Time after which the query is interrupted.
        most_rows: Largest number of rows in the result.
        most_bytes: Largest size of the result as text.

    Raises:
        StorageError: The statement is not a SELECT, DuckDB rejects it, it takes too long, or its
            result is too large.
    """
    with reading(path, deadline_seconds=deadline_seconds, alone=True) as db, _little_memory():
        for setting in _CONFINED:
            db.execute(setting)
        _check_one_select(db, sql)
        alarm = threading.Timer(most_seconds, db.interrupt)
        alarm.start()
        try:
            db.execute(sql)
            columns = [column[0] for column in db.description or ()]
            return columns, _rows(db, most_rows=most_rows, most_bytes=most_bytes)
        except duckdb.InterruptException as error:
            raise StorageError(
                f"the query took more than {most_seconds:g} s and was stopped, because commits of"
                " running batches wait for it: narrow it, or query a copy of the store"
            ) from error
        finally:
            alarm.cancel()


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Limit the memory that this process can allocate; nothing else may run in it meanwhile."""
    used = re.search(r"^VmData:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert used is not None
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = int(used[1]) * 1024 + MOST_MEMORY_BYTES
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([most, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _check_one_select(db: duckdb.DuckDBPyConnection, sql: str) -> None:
    try:
        kinds = [statement.type for statement in db.extract_statements(sql)]
    except ValueError:  # a type of statement unknown to this version of the binding
        kinds = []
    if kinds != [duckdb.StatementType.SELECT]:
        raise StorageError("a query must be one SELECT statement; it can only read the store")


def _rows(
    db: duckdb.DuckDBPyConnection, *, most_rows: int, most_bytes: int
) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    size = 0
    while some := db.fetchmany(_ROWS_AT_A_TIME):
        rows += some
        size += sum(len(str(value)) for row in some for value in row)
        if len(rows) > most_rows or size > most_bytes:
            raise StorageError(
                f"the result has more than {most_rows:,} rows or {most_bytes >> 20:,} MiB: add a"
                " LIMIT or aggregate; whole batches are written by `results BATCH --output FILE`"
            )
    return rows
