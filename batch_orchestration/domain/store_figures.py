"""Figures of the whole store, for metrics: sums over batches, never a request of its own."""

import msgspec

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import FINAL


class BatchFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What the store has of one batch; outcomes are those of committed chunks.

    Attributes:
        created_at: POSIX seconds.
    """

    batch_id: str
    status: BatchStatus
    created_at: float
    total: int
    completed: int
    failed: int

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to it."""
        return self.status in FINAL


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The store at one moment. What is marked so never falls, whatever is resumed or replayed.

    Attributes:
        batches_by_status: How many batches are in each.
        unfinished: Batches that are not final, oldest first.
        finished: The last few that are, newest first.
        committed_chunks: Chunks that ever were committed; never falls.
        completed: Answers that ever were committed, each request once; never falls.
        attempts: Submissions of requests in those chunks.
        prompt_tokens: Of the answers, as `completion_tokens`; neither falls.
        failures_by_code: Every failure that was final when it was committed; never falls.
        dead_letters: By code and state, now.
        latency_counts: Answers that took at most so long, by `LATENCY_BOUNDS`, then all of them;
            never fall.
        latency_seconds: Their sum; never falls.
    """

    batches_by_status: dict[str, int]
    unfinished: tuple[BatchFigures, ...]
    finished: tuple[BatchFigures, ...]
    committed_chunks: int
    completed: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    failures_by_code: dict[str, int]
    dead_letters: dict[tuple[str, str], int]
    latency_counts: tuple[int, ...]
    latency_seconds: float
