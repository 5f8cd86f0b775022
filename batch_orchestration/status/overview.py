"""The overview: the files and batches between inbox and outbox, at one moment."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from batch_orchestration.admission.claims import Claim, read_result
from batch_orchestration.admission.inbox import Inbox, Waiting
from batch_orchestration.admission.results import Rejected
from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.operations.health.damage import Damage, find_damage
from batch_orchestration.queue import files as queue_files
from batch_orchestration.queue import pause as queue_pause
from batch_orchestration.queue.entries import QueueEntry, QueueView, WaitReason
from batch_orchestration.status.views import BatchStatusView, view_batches
from batch_orchestration.store.store import Store

#: Older ones are still in the folder.
REJECTED_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The present state of a data folder.

    Attributes:
        batches: Newest first.
        waiting: Dropped files that are not claimed yet, each with a reason.
        claims: Files that are being read.
        rejected: The last few rejected files that still exist, newest first.
        queue: As `dispatch_sensor` last wrote it; None if it never ran.
        unread: Whether files wait, and no daemon has ever used this data folder.
        damaged: Unreadable files, each with the next step.
    """

    batches: tuple[BatchStatusView, ...]
    waiting: tuple[Waiting, ...]
    claims: tuple[Claim, ...]
    rejected: tuple[Rejected, ...]
    queue: QueueView | None = None
    unread: bool = False
    damaged: tuple[Damage, ...] = ()

    @property
    def store_problem(self) -> str | None:
        """Why the store could not be read; None if it could."""
        return next((view.store_problem for view in self.batches if view.store_problem), None)

    @property
    def empty(self) -> bool:
        """Whether no file was ever dropped."""
        return not (self.batches or self.waiting or self.claims or self.rejected or self.damaged)


def read_overview(*, folder: DataFolder, store: Store, inbox: Inbox, now: float) -> Overview:
    """Return the overview; a missing folder is an empty one.

    Args:
        folder: The data folder; nothing in it is changed.
        store: If it is locked, the batches' files are used instead.
    """
    waiting, claims, queue = [], [], _read_queue(folder)
    known = {entry.id: entry for entry in queue.entries} if queue else {}
    unread = not folder.queue.exists()
    if folder.inbox.is_dir():
        waiting = inbox.waiting(now=now)
        waiting += [
            Waiting(path, name, _ready(known.get(name), unread=unread))
            for path in inbox.ready_files(now=now)
            for name in (inbox.name_of(path),)
        ]
    if folder.claims.is_dir():
        claims = inbox.claims()
    batches = view_batches(folder=folder, store=store, now=now)
    return Overview(
        batches=tuple(batches),
        waiting=tuple(waiting),
        claims=tuple(claims),
        rejected=tuple(itertools.islice(rejections(folder), REJECTED_SHOWN)),
        queue=queue,
        unread=unread and bool(waiting or claims),
        damaged=tuple(find_damage(folder, _unfinished(batches, folder), thorough=True)),
    )


def _unfinished(views: Sequence[BatchStatusView], folder: DataFolder) -> set[str]:
    """Return the batches that are not known to have ended."""
    return set(folder.batch_ids()) - {view.batch_id for view in views if view.final}


def _ready(entry: QueueEntry | None, *, unread: bool) -> str:
    if unread:
        return "complete; no daemon has ever looked at this inbox"
    if entry is None or entry.reason in (None, WaitReason.SETTLING):
        return "complete; the inbox sensor will take it"
    return f"{entry.reason}: {entry.detail}"


def _read_queue(folder: DataFolder) -> QueueView | None:
    """Return the queue with the present pause, which may be newer than the last tick."""
    with contextlib.suppress(StorageError):
        view, paused = queue_files.read_queue(folder), queue_pause.read_pause(folder)
        if view is None and paused is None:
            return None
        view = view or QueueView(at=0.0)
        return msgspec.structs.replace(view, paused=paused)
    return None


def rejections(folder: DataFolder) -> Iterator[Rejected]:
    """Yield the rejected files that still exist, newest first."""
    results = (folder.claims / ".settled").glob("*.json")
    faults = Faults()  # `find_damage` reports the same
    for path in sorted(results, key=_changed_at, reverse=True):
        with faults.of(path.name):
            result = read_result(path)
            if isinstance(result, Rejected) and Path(result.rejected_path).exists():
                yield result


def _changed_at(path: Path) -> float:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0
