"""Refreshing the queue: only `dispatch_sensor` writes `queue.json`, at each of its ticks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.admission.registration import register_lost
from batch_orchestration.core.errors import BatchOrchestrationError, StorageError
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.dispatch.queue_building import read_queue
from batch_orchestration.estimates.batch_estimates import expected_seconds
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue import files as queue_files
from batch_orchestration.queue.entries import (
    EntryKind,
    EntryState,
    QueueEntry,
    QueueView,
    WaitReason,
)
from batch_orchestration.queue.load import QueueRules
from batch_orchestration.store.store import Store

#: Returns the seconds that the engine still needs for an entry; None if unknown.
SecondsOf = Callable[[QueueEntry], float | None]


@dataclass(frozen=True, kw_only=True)
class KeptQueue:
    """The queue as a tick has written it.

    Attributes:
        changed: Entries of batches whose wait reason has changed, or is gone.
    """

    view: QueueView
    changed: tuple[QueueEntry, ...]


def keep_queue(
    *,
    folder: DataFolder,
    store: Store,
    inbox: Inbox,
    rules: QueueRules,
    now: float,
    faults: Faults | None = None,
) -> KeptQueue:
    """Register batches that are missing from the store, and write the queue.

    Args:
        faults: Collects batches and claims that cannot be read completely.

    Raises:
        StorageError: The store cannot be read, or the queue cannot be written.
    """
    faults = Faults() if faults is None else faults
    register_lost(folder, store, at=now, faults=faults)
    queue = read_queue(folder=folder, store=store, inbox=inbox, rules=rules, now=now, faults=faults)
    view = with_expectations(queue.view, lambda entry: _seconds_of(entry, folder))
    before = None
    with contextlib.suppress(StorageError):  # a damaged file is replaced
        before = queue_files.read_queue(folder)
    queue_files.write_queue(folder, view)
    return KeptQueue(view=view, changed=tuple(_changed(before, view)))


def with_expectations(view: QueueView, seconds_of: SecondsOf) -> QueueView:
    """Return the queue with the estimated start and end of each entry.

    Entries are assumed to be served one after the other. The start is unknown after an entry
    without an estimate; while the queue is paused, only running entries have one. A paused batch
    delays no other entry.
    """
    at: float | None = view.at
    entries = []
    for entry in view.entries:
        if entry.reason is WaitReason.FAILURE_RATE:
            entries.append(entry)
            continue
        running = entry.state is EntryState.RUNNING
        start = at if view.paused is None or running else None
        seconds = seconds_of(entry)
        end = None if start is None or seconds is None else start + seconds
        entries.append(msgspec.structs.replace(entry, expected_start=start, expected_end=end))
        at = end
    return msgspec.structs.replace(view, entries=tuple(entries))


def _seconds_of(entry: QueueEntry, folder: DataFolder) -> float | None:
    if entry.kind is EntryKind.FILE:
        return None
    with contextlib.suppress(BatchOrchestrationError):
        plan = folder.read_plan(entry.id)
        band = expected_seconds(plan, folder=folder, pending=entry.pending)
        return None if band is None else band.mid
    return None


def _changed(before: QueueView | None, after: QueueView) -> Iterator[QueueEntry]:
    entries: Sequence[QueueEntry] = before.entries if before is not None else ()
    reasons = {entry.batch_id: entry.reason for entry in entries}
    for entry in after.entries:
        if entry.batch_id is not None and entry.reason is not reasons.get(entry.batch_id):
            yield entry
