"""Batches that are paused because too many of their requests fail."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from batch_orchestration.core.errors import BatchOrchestrationError, StorageError
from batch_orchestration.core.lifecycle import Halt
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.data_folder import DataFolder


def halt_in_force(folder: DataFolder, batch_id: str) -> Halt | None:
    """Return the halt of a batch; None if it is not paused, was resumed since, or ends early.

    A damaged halt file still pauses the batch, because a run wrote it.

    Raises:
        StorageError: Another decision file of the batch is damaged.
    """
    try:
        halt = folder.halt(batch_id).read()
    except StorageError as error:
        halt = _damaged(folder.halt(batch_id).path, error)
    if halt is None or folder.early_end(batch_id).read() is not None:
        return None
    resumption = folder.resumption(batch_id).read()
    return None if resumption is not None and resumption.at >= halt.at else halt


def _damaged(path: Path, error: StorageError) -> Halt:
    with contextlib.suppress(OSError):
        return Halt(
            at=path.lstat().st_mtime,
            actor="a run",
            failed=0,
            judged=0,
            max_failure_rate=1.0,
            alike=0,
            examples=(),
            damaged=f"too many of its requests failed, and which cannot be read: {error}",
        )
    raise error


def halts_in_force(folder: DataFolder, records: Iterable[BatchRecord]) -> dict[str, Halt]:
    """Return the halts of the paused batches, by batch id.

    A batch whose early end or resumption is damaged is left out; the loop that works on the batch
    reports the damage.
    """
    found: dict[str, Halt] = {}
    for record in records:
        with contextlib.suppress(BatchOrchestrationError):
            if (halt := halt_in_force(folder, record.batch_id)) is not None:
                found[record.batch_id] = halt
    return found


def what_helps(batch_id: str) -> str:
    """Return the commands with which a person can continue or end a paused batch."""
    return (
        f"resume {batch_id} (--max-failure-rate 1 to go on whatever fails),"
        f" or cancel {batch_id} and replay what failed"
    )
