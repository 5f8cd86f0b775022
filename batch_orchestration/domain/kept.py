"""The fraction of the raw engine kept: where the wall time of a batch went, by name."""

import msgspec


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Wall time of all runs of a batch, in seconds. What is not lost is `kept_seconds`.

    Attributes:
        wall_seconds: From the start of each run's work to its end, runs added up.
        start_up_seconds: Until the engine was ready.
        feed_gap_seconds: The engine could have had more to do and was not given it.
        drain_seconds: Nothing was left to give, and the last answers came in.
        commit_seconds: Everything was answered and not yet committed.
        engine_busy_seconds: The engine had something to compute, by its own metrics.
        held_seconds: The engine could have had more, and was given less on purpose: heat.
        narrow_seconds: Of the kept time: the window was full, and the engine let nothing wait. A
            wider window might have done more; how much more nobody knows.
        tokens: Written by the engine, by its own counter where it has one.
        full_seconds: The engine was full, between two readings of that counter.
        full_tokens: Written in that time.
        runs: How many runs worked for the batch.
    """

    wall_seconds: float
    start_up_seconds: float
    feed_gap_seconds: float
    drain_seconds: float
    commit_seconds: float
    engine_busy_seconds: float
    held_seconds: float = 0.0
    narrow_seconds: float = 0.0
    tokens: float = 0.0
    full_seconds: float = 0.0
    full_tokens: float = 0.0
    runs: int = 0

    @property
    def kept_seconds(self) -> float:
        """Wall time in which the engine was fully used."""
        lost = self.start_up_seconds + self.feed_gap_seconds + self.held_seconds
        return max(0.0, self.wall_seconds - lost - self.drain_seconds - self.commit_seconds)

    @property
    def fraction(self) -> float:
        """Share of the wall time in which the engine was fully used, 0 to 1."""
        return self.kept_seconds / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Over the whole wall time."""
        return self.tokens / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def full_tokens_per_second(self) -> float | None:
        """While the engine was full; None if it never was for as long as between two readings."""
        return self.full_tokens / self.full_seconds if self.full_seconds > 0 else None
