"""Adjusts the width of the window to the engine's metrics. Pure: clocks are passed in.

vLLM admits as many requests as it can run, and those that wait cost it nothing. The window must
therefore be wide enough that a few requests always wait at the engine, and no wider: each further
request is one more suspect if the engine dies. The window is too wide only if the engine admits
more than its KV cache can hold to the end: then it preempts requests and computes them again.
"""

from dataclasses import dataclass
from statistics import fmean

from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.estimates.derivation import MOST_IN_FLIGHT, READING_COST, queued

#: Share of the engine's work that is done again. In sweeps (benchmarks/README.md) the best window
#: of a tight cache wastes 4 to 7 %, because a wider batch gains more than that. The window may grow
#: up to the first value and narrows above the second; between them nothing changes, for hysteresis.
WASTE_TOLERATED, WASTE_TOO_MUCH = 0.03, 0.10
#: More waiting requests than this share of the running ones, plus this number, are too many.
SURPLUS_SHARE, SURPLUS_LEAST = 0.5, 16
#: Growth of a window that is too narrow, at one decision: fast while most of the cache is free.
FAST_GROWTH, SLOW_GROWTH = 1.5, 1.06
#: Share of the KV cache above which growth is slow, because young sequences still grow.
FULL_USAGE = 0.6
#: After too much waste the window narrows to this share of the admitted requests.
BACK_OFF = 0.94
#: The most admitted requests to assume, as a multiple of the running ones.
ROOM_FOR_PREEMPTED = 1.2
#: A width that wasted too much is not tried again for this many decisions ...
MEMORY = 20
#: ... nor is any width above this share of it.
KEEP_BELOW = 0.96
#: Weight of the latest waste: a few long requests that come together make it jump.
SMOOTHING = 0.5
#: Between two decisions: the duration of a request, within these limits. A change affects the cache
#: only once sequences have grown.
LEAST_SECONDS, MOST_SECONDS = 5.0, 60.0
#: A window is filled at this share, less one request; below that its width has no effect.
FILLED = 0.9


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The limits of the window's width, and the cost by which waste is judged.

    Attributes:
        reading_cost: Of a prompt token, in generated tokens: work done again only reads tokens.
    """

    least: int = 8
    most: int = MOST_IN_FLIGHT
    reading_cost: float = READING_COST


class WindowControl:
    """Adjusts the width of the window to the engine's metrics.

    Args:
        start: Initial width.
        bounds: None if the width is fixed.
    """

    def __init__(self, start: int, bounds: Bounds | None) -> None:
        self.width = start if bounds is None else max(bounds.least, min(bounds.most, start))
        self.reason = "as set" if bounds is None else "as derived"
        self._bounds = bounds
        self._epoch: _Epoch | None = None
        #: A width that wasted too much, and for how many more decisions it is avoided.
        self._too_wide, self._remembered = 0.0, 0
        self._waste = 0.0

    def note(
        self, figures: EngineMetrics | None, *, in_flight: int, settled: int, now: float
    ) -> bool:
        """Record a poll of the engine; return whether the width has changed.

        A poll has no effect if there are no metrics, if the window is not filled, or if it was
        narrowed and still holds too many requests.

        Args:
            figures: None if the engine did not answer.
            in_flight: Requests that the engine has.
            settled: Counter of requests with an outcome.
            now: Monotonic seconds.
        """
        if self._bounds is None:
            return False
        poll = _Poll.of(figures, in_flight, settled, now)
        if poll is None or in_flight > self.width:
            self._epoch = None
            return False
        if self._epoch is None or poll.is_of_another_engine(self._epoch.first):
            self._epoch = _Epoch(poll)
            return False
        self._epoch.add(poll)
        if not self._epoch.is_long_enough:
            return False
        before, epoch = self.width, self._epoch
        self._epoch = _Epoch(poll)
        if epoch.in_flight >= FILLED * self.width - 1:
            self._decide(epoch, self._bounds)
        return self.width != before

    def _decide(self, epoch: "_Epoch", bounds: Bounds) -> None:
        self._remembered = max(0, self._remembered - 1)
        running, waiting = epoch.running, epoch.waiting
        waste = SMOOTHING * epoch.waste(bounds.reading_cost) + (1 - SMOOTHING) * self._waste
        self._waste = waste
        width = float(self.width)
        if waste > WASTE_TOO_MUCH:
            # Preempted requests wait, so more were admitted than run now.
            let_in = min(width, ROOM_FOR_PREEMPTED * running)
            self._too_wide, self._remembered = let_in, MEMORY
            width = BACK_OFF * let_in
            self.reason = f"{waste:.0%} of its work is done again, the KV cache is too full"
        elif epoch.never_needed > SURPLUS_LEAST + SURPLUS_SHARE * running:
            width -= epoch.never_needed - queued(running)
            self.reason = (
                f"never fewer than {epoch.never_needed} requests wait at the engine, which runs"
                f" {running:.0f}"
            )
        elif waiting < 1 and waste <= WASTE_TOLERATED:
            width *= FAST_GROWTH if epoch.usage < FULL_USAGE else SLOW_GROWTH
            width = max(width, self.width + 1)
            if self._remembered:
                width = min(width, max(self.width, KEEP_BELOW * self._too_wide))
            self.reason = f"nothing waits at the engine, its KV cache is {epoch.usage:.0%} full"
        self.width = max(bounds.least, min(bounds.most, round(width)))


@dataclass(frozen=True, kw_only=True)
class _Poll:
    """One poll of an engine that exposes all the metrics needed."""

    at: float
    running: int
    waiting: int
    usage: float
    cache_tokens: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    settled: int
    in_flight: int

    @classmethod
    def of(
        cls, figures: EngineMetrics | None, in_flight: int, settled: int, now: float
    ) -> "_Poll | None":
        if figures is None or figures.running is None or figures.waiting is None:
            return None
        return cls(
            at=now,
            running=figures.running,
            waiting=figures.waiting,
            usage=figures.kv_usage or 0.0,
            cache_tokens=figures.kv_cache_tokens or 0,
            preemptions=figures.preemptions or 0,
            prompt_tokens=figures.prompt_tokens or 0,
            generation_tokens=figures.generation_tokens or 0,
            settled=settled,
            in_flight=in_flight,
        )

    def is_of_another_engine(self, first: "_Poll") -> bool:
        """Whether its counters are those of another engine."""
        return (
            self.prompt_tokens < first.prompt_tokens
            or self.generation_tokens < first.generation_tokens
            or self.preemptions < first.preemptions
        )


class _Epoch:
    """The polls since the latest decision."""

    def __init__(self, first: _Poll) -> None:
        self.first = self._last = first
        self._polls: list[_Poll] = []

    def add(self, poll: _Poll) -> None:
        self._last = poll
        self._polls.append(poll)

    @property
    def is_long_enough(self) -> bool:
        seconds = self._last.at - self.first.at
        settled = self._last.settled - self.first.settled
        # By Little's law a request takes (requests in flight) / (requests settled per second).
        latency = self._last.in_flight * seconds / settled if settled else MOST_SECONDS
        return seconds >= max(LEAST_SECONDS, min(MOST_SECONDS, latency))

    @property
    def in_flight(self) -> float:
        return fmean(poll.in_flight for poll in self._polls)

    @property
    def running(self) -> float:
        return fmean(poll.running for poll in self._polls)

    @property
    def waiting(self) -> float:
        return fmean(poll.waiting for poll in self._polls)

    @property
    def never_needed(self) -> int:
        """How many requests waited at every poll."""
        return min(poll.waiting for poll in self._polls)

    @property
    def usage(self) -> float:
        return fmean(poll.usage for poll in self._polls)

    def waste(self, reading_cost: float) -> float:
        """Share of work that was done again: for each preemption, the tokens of a mean sequence."""
        held = self.usage * self._last.cache_tokens / max(1.0, self.running)
        again = reading_cost * held * (self._last.preemptions - self.first.preemptions)
        read = reading_cost * (self._last.prompt_tokens - self.first.prompt_tokens)
        written = self._last.generation_tokens - self.first.generation_tokens
        return again / max(1.0, again + read + written)
