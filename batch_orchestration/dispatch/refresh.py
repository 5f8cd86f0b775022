"""Refreshing the queue: only `dispatch_sensor` writes `queue.json`, at each of its ticks."""

import contextlib
from collections.abc import Iterator, Sequence

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.registration import register_lost
from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.dispatch.queue_building import build_queue
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.entries import QueueEntry, QueueView
from batch_orchestration.queue.files import read_queue, write_queue
from batch_orchestration.settings import Settings
from batch_orchestration.store.store import Store


def refresh_queue(
    *,
    folder: DataFolder,
    store: Store,
    inbox: Inbox,
    settings: Settings,
    now: float,
    faults: Faults | None = None,
) -> tuple[QueueView, list[QueueEntry]]:
    """Register batches that are missing from the store, and write the queue.

    Args:
        faults: Collects batches and claims that cannot be read completely.

    Returns:
        The queue, and its batches whose wait reason has changed since the previous tick.

    Raises:
        StorageError: The store cannot be read, or the queue cannot be written.
    """
    faults = Faults() if faults is None else faults
    register_lost(folder, store, at=now, faults=faults)
    view = build_queue(
        inbox.look(now=now),
        folder=folder,
        store=store,
        inbox=inbox,
        settings=settings,
        now=now,
        faults=faults,
    )
    before = None
    with contextlib.suppress(StorageError):  # a damaged file is replaced
        before = read_queue(folder)
    write_queue(folder, view)
    return view, list(_changed(before, view))


def _changed(before: QueueView | None, after: QueueView) -> Iterator[QueueEntry]:
    entries: Sequence[QueueEntry] = before.entries if before is not None else ()
    reasons = {entry.batch_id: entry.reason for entry in entries}
    for entry in after.entries:
        if entry.batch_id is not None and entry.reason is not reasons.get(entry.batch_id):
            yield entry
