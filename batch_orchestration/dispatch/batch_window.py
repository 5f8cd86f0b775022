"""The window of a batch: the chunks whose requests may be open now."""

from collections.abc import Collection, Sequence

from batch_orchestration.core.results import BatchRecord


def open_chunks(
    batch: BatchRecord, committed: Collection[int], most_requests: int
) -> Sequence[int]:
    """Return the unfinished chunks that may be answered now, in file order; none if all are done.

    They belong to one window, which moves on once all of it is committed. A batch that is more
    urgent by then goes first, and no run covers only a chunk or two.
    """
    missing = sorted(set(range(batch.chunks)).difference(committed))
    width = max(1, most_requests // batch.requests_per_chunk)
    return [number for number in missing if number // width == missing[0] // width]
