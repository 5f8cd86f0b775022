"""The order of service of the admitted batches, from what the store knows of them."""

from collections.abc import Callable, Iterable

from batch_orchestration.domain.commits import BatchRecord
from batch_orchestration.domain.lifecycle import window_seconds
from batch_orchestration.domain.ordering import Candidate, OrderPolicy, Place, order
from batch_orchestration.storage.store import Store

#: Sources share by what they got in this time: long enough for a chunk or two of a slow engine,
#: short enough that nobody pays for yesterday.
SHARE_SECONDS = 3600.0
#: Of a request that nobody has an estimate of; it only matters beside others.
TYPICAL_TOKENS = 1000

#: Seconds that the engine still needs for a batch; None while that is unknown.
Remaining = Callable[[BatchRecord], float | None]


def order_batches(
    batches: Iterable[BatchRecord],
    store: Store,
    *,
    now: float,
    policy: OrderPolicy,
    remaining: Remaining = lambda batch: None,
) -> list[Place]:
    """Return the batches in the order of service; the candidate's id is the batch's.

    Raises:
        StorageError: The store cannot be read.
    """
    candidates = [batch_candidate(batch, seconds=remaining(batch)) for batch in batches]
    if not candidates:
        return []
    return order(candidates, now=now, policy=policy, served=served_of_late(store, now=now))


def batch_candidate(batch: BatchRecord, *, seconds: float | None = None) -> Candidate:
    """Return an admitted batch as one who wants the engine; its work counts in tokens."""
    settled = batch.completed + batch.failed
    tokens = batch.prompt_tokens + batch.completion_tokens
    each = tokens / settled if settled and tokens else TYPICAL_TOKENS
    arrived_at = min(batch.times.values())
    return Candidate(
        id=batch.batch_id,
        source=batch.source,
        priority=batch.options.priority,
        arrived_at=arrived_at,
        deadline=arrived_at + window_seconds(batch.options.completion_window),
        seconds=seconds,
        work=batch.pending * each,
    )


def served_of_late(store: Store, *, now: float) -> dict[str, float]:
    """Return the tokens that each source got in the last `SHARE_SECONDS`.

    Raises:
        StorageError: The store cannot be read.
    """
    by_batch = store.tokens_since(now - SHARE_SECONDS)
    served: dict[str, float] = {}
    for batch in store.batches() if by_batch else ():
        source = batch.source
        served[source] = served.get(source, 0.0) + by_batch.get(batch.batch_id, 0)
    return served
