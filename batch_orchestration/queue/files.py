"""Small files of the data folder: the queue as `dispatch_sensor` last saw it, and the pause.

And which batches wait for a person.
"""

import contextlib
from collections.abc import Sequence

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.atomic import disk_errors, read_kept, sync_folder, write_atomically
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.entries import NeedsAttention, Pause, QueueView


def write_queue(folder: DataFolder, view: QueueView) -> None:
    """Replace the queue that everyone reads."""
    write_atomically(folder.queue, msgspec.json.encode(view))


def read_queue(folder: DataFolder) -> QueueView | None:
    """Return the queue as it was last written; None if it never was.

    Raises:
        StorageError: It is damaged.
    """
    return read_kept(folder.queue, QueueView)


def pause(folder: DataFolder, pause: Pause) -> None:
    """Keep, durably, that the queue is paused; a later pause takes the place of an earlier one."""
    write_atomically(folder.paused, msgspec.json.encode(pause))


def unpause(folder: DataFolder) -> Pause | None:
    """Let the queue go on; return the pause that ends, None if there was none."""
    before = read_pause(folder)
    with disk_errors(folder.paused):
        folder.paused.unlink(missing_ok=True)
        if before is not None:
            sync_folder(folder.root)
    return before


def read_pause(folder: DataFolder) -> Pause | None:
    """Return the pause; None if the queue is not paused.

    One that is damaged is a pause all the same: somebody wanted it.
    """
    try:
        return read_kept(folder.paused, Pause)
    except StorageError as error:
        return Pause(
            at=0.0, actor="somebody", reason=f"{error}; resume the queue, or pause it anew"
        )


def write_needs_attention(folder: DataFolder, needs: Sequence[NeedsAttention]) -> None:
    """Keep which batches wait for a person; written only when that has changed."""
    with contextlib.suppress(StorageError):  # a damaged one is replaced
        if read_needs_attention(folder) == tuple(needs):
            return
    write_atomically(folder.needs, msgspec.json.encode(needs))


def read_needs_attention(folder: DataFolder) -> tuple[NeedsAttention, ...] | None:
    """Return which batches wait for a person; None if no tick has said so yet.

    Raises:
        StorageError: It is damaged.
    """
    return read_kept(folder.needs, tuple[NeedsAttention, ...])
