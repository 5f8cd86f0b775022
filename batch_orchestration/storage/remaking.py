"""Putting a store that was made anew in the place of one that is damaged."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.atomic import disk_errors, make_folder, sync_folder
from batch_orchestration.files.moving import move_into
from batch_orchestration.store.connection import DEADLINE_SECONDS, replacing
from batch_orchestration.store.store import Store


def remake(
    path: Path,
    fill: Callable[[Store], None],
    *,
    at: float,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Path | None:
    """Make a store, let `fill` fill it, and put it in its place; return where the old file is.

    The old one, if there is one, is renamed and never deleted. All writers of ours wait meanwhile.
    If `fill` raises, everything is as before.

    Raises:
        StoreLocked: Others were writing past the deadline.
        StorageError: The folder cannot be written.
    """
    with disk_errors(path):
        make_folder(path.parent)
    with (
        replacing(path, deadline_seconds=deadline_seconds),
        TemporaryDirectory(prefix=".recover-", dir=path.parent) as folder,
    ):
        made = Path(folder) / path.name
        store = Store(made, root=path.parent)
        store.migrate()
        fill(store)
        if made.with_name(f"{made.name}.wal").exists():
            raise StorageError(f"{path} could not be made anew: DuckDB left a log behind")
        with disk_errors(path):
            kept = _set_aside(path, at)
            made.rename(path)
            sync_folder(path.parent)
    return kept


def _set_aside(path: Path, at: float) -> Path | None:
    """Rename the file and its log, so that DuckDB could still open them together."""
    if not path.exists():
        return None
    moment = datetime.fromtimestamp(at, UTC).strftime("%Y%m%dT%H%M%SZ")
    kept = move_into(path, path.parent, f"{path.name}.damaged-{moment}")
    log = path.with_name(f"{path.name}.wal")
    if log.exists():
        move_into(log, path.parent, f"{kept.name}.wal")
    return kept
