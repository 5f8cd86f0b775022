"""Rates of a run: how fast outcomes arrive, and when the last one will."""

from collections import deque

#: Long enough to smooth the arrival of whole windows, short enough to follow a slowdown.
WINDOW_SECONDS = 30.0


class Meter:
    """Counts outcomes and tokens and tells their rates over the last `WINDOW_SECONDS`.

    Times are POSIX or monotonic seconds, as long as they are always the same clock's.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._samples: deque[tuple[float, int, int]] = deque()

    @property
    def outcomes(self) -> int:
        """Completions and failures counted so far."""
        return self.completed + self.failed

    def forget_rates(self) -> None:
        """Begin the rates anew: what went before, such as the engine's start, was no work."""
        self._samples.clear()

    def sample(self, now: float) -> None:
        """Remember the counts of this moment; call about once a second."""
        self._samples.append((now, self.outcomes, self.completion_tokens))
        while len(self._samples) > 2 and now - self._samples[0][0] > WINDOW_SECONDS:
            self._samples.popleft()

    def rates(self) -> tuple[float, float]:
        """Return outcomes per second and completion tokens per second."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        (start, outcomes, tokens), (end, outcomes_now, tokens_now) = (
            self._samples[0],
            self._samples[-1],
        )
        seconds = end - start
        if seconds <= 0:
            return 0.0, 0.0
        return (outcomes_now - outcomes) / seconds, (tokens_now - tokens) / seconds
