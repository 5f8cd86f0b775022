"""Partial results: the requests of a batch that have an outcome so far, in input order.

Committed chunks come from the store, the others from their journals, which need no lock. A run in
progress is not affected.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from batch_orchestration.core.batches import BatchPlan, BatchStatus, Chunk
from batch_orchestration.core.errors import BatchNotFound
from batch_orchestration.core.results import SettledRequest
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal import read_journal, replay_journal
from batch_orchestration.files.kept_input import ChunkRef
from batch_orchestration.store.rows import as_stored
from batch_orchestration.store.store import Store

#: Pause between two reads of the store, so that a waiting commit gets its turn: our writers retry
#: at least every quarter of a second.
PAUSE_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class FinishedSoFar:
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


def finished_so_far(batch_id: str, *, folder: DataFolder, store: Store) -> FinishedSoFar:
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
        if chunk.number in committed:
            continue
        ref = ChunkRef.of(plan, chunk.number, folder)
        if end := _size(ref):
            state = replay_journal(ref.journal_path, batch_id, chunk.number, end=end)
            done += len(state.settled)
            ends[chunk.number] = end
    return FinishedSoFar(
        plan=plan,
        status=status,
        committed=frozenset(committed),
        journal_ends=ends,
        done=done,
    )


def read_finished(
    finished: FinishedSoFar, *, folder: DataFolder, store: Store
) -> Iterator[SettledRequest]:
    """Yield exactly the requests that `finished` counted, in input order, each once.

    Each request is yielded as the store has it or will have it, so its output line is final unless
    a failed request is replayed. One chunk is held at a time, the store's file only while reading.

    Raises:
        StorageError: The store or a journal cannot be read.
    """
    for chunk in finished.plan.chunks:
        if chunk.number in finished.committed:
            yield from store.settled_in(finished.plan.batch_id, chunk.number)
            if finished.partial:
                time.sleep(PAUSE_SECONDS)
        elif chunk.number in finished.journal_ends:
            yield from _from_journal(finished, chunk, folder)


def _from_journal(
    finished: FinishedSoFar, chunk: Chunk, folder: DataFolder
) -> Iterator[SettledRequest]:
    plan, number = finished.plan, chunk.number
    ref = ChunkRef.of(plan, number, folder)
    for entry in read_journal(ref.journal_path, end=finished.journal_ends[number]):
        yield as_stored(plan.batch_id, number, entry.settled())


def _size(ref: ChunkRef) -> int:
    try:
        return ref.journal_path.stat().st_size
    except FileNotFoundError:
        return 0
