"""Files of the queue in the data folder: its last view, and `needs-attention.json`.

`dispatch_sensor` writes the view. `needs-attention.json` lists the batches that wait for a person.
"""

import contextlib
from collections.abc import Sequence

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.queue.entries import NeedsAttention, QueueView


def write_queue(folder: DataFolder, view: QueueView) -> None:
    """Replace the public view of the queue."""
    StateFile(folder.queue, QueueView).write(view)


def read_queue(folder: DataFolder) -> QueueView | None:
    """Return the last written view of the queue; None if none was ever written.

    Raises:
        StorageError: The file is damaged.
    """
    return StateFile(folder.queue, QueueView).read()


def write_needs_attention(folder: DataFolder, needs: Sequence[NeedsAttention]) -> None:
    """Store the batches that wait for a person; the file is written only if the list changed."""
    with contextlib.suppress(StorageError):  # a damaged file is replaced
        if read_needs_attention(folder) == tuple(needs):
            return
    StateFile(folder.needs, tuple[NeedsAttention, ...]).write(tuple(needs))


def read_needs_attention(folder: DataFolder) -> tuple[NeedsAttention, ...] | None:
    """Return the batches that wait for a person; None if no tick has stored them yet.

    Raises:
        StorageError: The file is damaged.
    """
    return StateFile(folder.needs, tuple[NeedsAttention, ...]).read()
