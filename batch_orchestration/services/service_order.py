"""What the order of service is made of and what it means for the batches that are admitted."""

import math
from collections.abc import Iterable

from batch_orchestration.core.results import BatchRecord
from batch_orchestration.queue.entries import QueueView
from batch_orchestration.queue.ordering import whole_points
from batch_orchestration.store.store import Store

#: Sources share by what they got in this time: long enough for a chunk or two of a slow engine,
#: short enough that nobody pays for yesterday.
SHARE_SECONDS = 3600.0


def in_order_of_service(batches: Iterable[BatchRecord], view: QueueView) -> list[BatchRecord]:
    """Return the batches as they stand in the queue; those that do not stand there come last."""
    places = {entry.batch_id: entry.place for entry in view.entries}
    return sorted(
        batches,
        key=lambda batch: (places.get(batch.batch_id, math.inf), batch.batch_id),
    )


def run_priorities(view: QueueView) -> dict[str, int]:
    """Return the priority of the runs of each batch: its whole points of effective priority."""
    return {
        entry.batch_id: whole_points(entry.effective_priority)
        for entry in view.entries
        if entry.batch_id is not None
    }


def served_of_late(store: Store, *, now: float) -> dict[str, float]:
    """Return the tokens that each source got in the last `SHARE_SECONDS`.

    Raises:
        StorageError: The store cannot be read.
    """
    by_batch = store.tokens_since(now - SHARE_SECONDS)
    served: dict[str, float] = {}
    for batch in store.records(by_batch).values():
        served[batch.source] = served.get(batch.source, 0.0) + by_batch[batch.batch_id]
    return served
