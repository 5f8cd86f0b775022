"""The window of a batch: the chunks whose requests may be open now."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from batch_orchestration.core.results import BatchRecord


def chunks_by_window(
    batch: BatchRecord, committed: Iterable[int], *, most_requests: int, chunks_per_run: int
) -> Iterator[Sequence[range]]:
    """Yield the windows with unfinished chunks in file order, each as the runs that cover these.

    A window has at most `most_requests` requests, but at least one chunk. One with more chunks than
    a run may have consists of whole runs, so that no run is cut short at its border.

    Args:
        committed: Numbers of the chunks that are finished.
        chunks_per_run: Upper bound of the chunks in a run.
    """
    width = max(1, most_requests // batch.requests_per_chunk)
    if width > chunks_per_run:
        width -= width % chunks_per_run
    missing = sorted(set(range(batch.chunks)).difference(committed))
    for _, window in groupby(missing, key=lambda number: number // width):
        yield tuple(consecutive(tuple(window), min(chunks_per_run, width)))


def consecutive(numbers: Sequence[int], longest: int) -> Iterator[range]:
    """Cut ascending numbers into ranges without gaps, none across a multiple of `longest`.

    The fixed grid keeps a later attempt on the range of the first one.
    """
    for _, places in groupby(enumerate(numbers), key=lambda p: (p[1] - p[0], p[1] // longest)):
        members = [number for _, number in places]
        yield range(members[0], members[-1] + 1)
