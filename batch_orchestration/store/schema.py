"""Migration of a DuckDB file to the current schema."""

from importlib import resources
from pathlib import Path

import duckdb

from batch_orchestration.core.errors import StoreOfOtherVersion
from batch_orchestration.store.connection import DEADLINE_SECONDS, creating, reading, writing

#: Path and inode of files that are up to date; a new file at the same path has another inode.
_current: set[tuple[Path, int]] = set()


def migrate(path: Path, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Apply the migrations that a file lacks, or create a missing file; cheap if it is up to date.

    A file that is up to date is only read, so that users without write access can query it.

    Raises:
        StorageError: The file was written by a newer version, or cannot be opened.
    """
    if _identity(path) in _current:
        return
    made = False
    if _identity(path) is None:
        with creating(path, deadline_seconds=deadline_seconds) as connection:
            if connection:
                _apply(connection, path)
                made = True
    if not made and _lacks_migrations(path, deadline_seconds):
        with writing(path, deadline_seconds=deadline_seconds) as connection:
            _apply(connection, path)
    if identity := _identity(path):
        _current.add(identity)


def _identity(path: Path) -> tuple[Path, int] | None:
    """Return path and inode of the file; None if it is missing or empty."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (path.resolve(), status.st_ino) if status.st_size else None


def _migrations() -> dict[int, tuple[str, str]]:
    """Return name and SQL of each migration by number, in order."""
    folder = resources.files("batch_orchestration.store") / "migrations"
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".sql"))
    return {int(name.split("_")[0]): (name, (folder / name).read_text()) for name in files}


def _lacks_migrations(path: Path, deadline_seconds: float) -> bool:
    with reading(path, deadline_seconds=deadline_seconds) as connection:
        tables = connection.execute(
            "SELECT 1 FROM information_schema.tables WHERE table_name = 'schema_migrations'"
        ).fetchall()
        return not tables or bool(_migrations().keys() - _applied(connection, path))


def _applied(connection: duckdb.DuckDBPyConnection, path: Path) -> set[int]:
    rows = connection.execute("SELECT version FROM schema_migrations").fetchall()
    applied = {int(version) for (version,) in rows}
    known = _migrations().keys()
    if unknown := applied - known:
        written = f"{path} was written by {{}} version of batch_orchestration"
        if max(unknown) > max(known):
            newer = written.format("a newer")
            raise StoreOfOtherVersion(
                f"{newer} (schema {max(unknown)}): upgrade, or use another data folder"
            )
        raise StoreOfOtherVersion(
            f"{written.format('an earlier')} (schema {max(unknown)}), which this one does not read:"
            " finish or export its batches with that version, then start with a new data folder"
            " (BATCH_DATA_DIR)"
        )
    return applied


def _apply(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    connection.execute(
        "CREATE TABLE IF NOT EXISTS schema_migrations"
        " (version INTEGER NOT NULL, name VARCHAR NOT NULL)"
    )
    applied = _applied(connection, path)
    for version, (name, sql) in _migrations().items():
        if version not in applied:
            connection.execute(sql)
            connection.execute("INSERT INTO schema_migrations VALUES (?, ?)", [version, name])
