"""Snapshots: the requests of a batch that have an outcome at one moment, in input order.

Committed chunks come from the store, the others from their journals, which need no lock. A run in
progress is not affected.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.errors import BatchNotFound
from batch_orchestration.core.results import SettledRequest
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal import read_journal, replay_journal
from batch_orchestration.store.rows import as_stored
from batch_orchestration.store.store import Store

#: Pause between two reads of the store, so that a waiting commit gets its turn: our writers retry
#: at least every quarter of a second.
PAUSE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The requests of a batch that had an outcome at one moment.

    Attributes:
        committed: Numbers of the chunks in the store.
        journal_ends: Journal size in bytes of each other chunk that was begun.
        done: Requests with an outcome.
    """

    plan: BatchPlan
    status: BatchStatus
    committed: frozenset[int]
    journal_ends: dict[int, int]
    done: int

    @property
    def total(self) -> int:
        """Requests of the batch."""
        return self.plan.requests

    @property
    def partial(self) -> bool:
        """Whether requests without an outcome remain."""
        return self.done < self.total

    @property
    def all_committed(self) -> bool:
        """Whether the batch can be delivered."""
        return len(self.committed) == len(self.plan.chunks)


def take_snapshot(batch_id: str, *, folder: DataFolder, store: Store) -> Snapshot:
    """Determine which requests of a batch have an outcome now.

    Raises:
        BatchNotFound: There is no such batch.
        StorageError: The store cannot be read.
    """
    plan = folder.read_plan(batch_id)
    try:
        status = store.batch(batch_id).status
    except BatchNotFound:
        # Admission writes the plan first and the record right after.
        status = BatchStatus.VALIDATING
    committed = store.chunk_reports(batch_id)
    done = sum(report.requests for report in committed.values())
    ends: dict[int, int] = {}
    for chunk in plan.chunks:
        path = folder.journal_path(batch_id, chunk.number)
        if chunk.number not in committed and path.exists():
            ends[chunk.number] = end = path.stat().st_size
            done += len(replay_journal(path, batch_id, chunk.number, end=end).settled)
    return Snapshot(
        plan=plan,
        status=status,
        committed=frozenset(committed),
        journal_ends=ends,
        done=done,
    )


def read_snapshot(
    snapshot: Snapshot, *, folder: DataFolder, store: Store
) -> Iterator[SettledRequest]:
    """Yield the requests that `snapshot` counted, in input order, each once.

    Each request is yielded as the store has it or will have it, so its output line is final unless
    a failed request is replayed. If the batch is resumed meanwhile, the failures of its early end
    are left out. One chunk is held at a time, the store's file only while reading.

    Raises:
        StorageError: The store or a journal cannot be read.
    """
    for chunk in snapshot.plan.chunks:
        yield from _read_chunk(snapshot, chunk.number, folder, store)
        if snapshot.partial and chunk.number in snapshot.committed:
            time.sleep(PAUSE_SECONDS)


def _read_chunk(
    snapshot: Snapshot, number: int, folder: DataFolder, store: Store
) -> Iterator[SettledRequest]:
    batch_id, end = snapshot.plan.batch_id, snapshot.journal_ends.get(number)
    if number in snapshot.committed:
        settled = store.settled_in(batch_id, number)
        if (first := next(settled, None)) is not None:
            yield first
            yield from settled
            return
        # A resumption took the commit back; the journal has all of the chunk's answers.
    elif end is None:
        return
    for entry in read_journal(folder.journal_path(batch_id, number), end=end):
        yield as_stored(batch_id, number, entry.settled())
