"""Estimates when a batch will be done, from its remaining tokens rather than its requests."""

from collections import Counter, deque

from batch_orchestration.core.outcomes import Completion, Outcome
from batch_orchestration.estimates.costs import GUESSED, work_shared
from batch_orchestration.estimates.estimate import Estimate

#: Long answers arrive in bursts: in a shorter window, each would look like a change of speed.
WINDOW_SECONDS = 120.0
#: Weight of the expectation of a shape, as a number of its answers.
EXPECTATION_WEIGHT = 5.0


class RemainingWork:
    """Learns the remaining work of each shape from its answers.

    Work is measured in the estimate's costs, to tell a prompt of 3,000 tokens with an answer of two
    from a prompt of 700 with an answer of a thousand.
    """

    def __init__(self, estimate: Estimate) -> None:
        self._costs = estimate.costs or GUESSED
        self._at_a_time = estimate.at_a_time
        self._expected = estimate.shapes
        self._seen: Counter[str] = Counter()
        self._work: dict[str, float] = {}
        self._done = 0.0
        self._samples: deque[tuple[float, float]] = deque()

    def begin(self, now: float) -> None:
        """Measure the speed from now on, when the engine is ready."""
        self._samples.clear()
        self.sample(now)

    def count(self, shape: str, outcome: Outcome) -> None:
        """Count an outcome; a failure counts as no work."""
        self._seen[shape] += 1
        if isinstance(outcome, Completion):
            work = self._costs.seconds(
                work_shared(
                    requests=1,
                    prompt_tokens=outcome.usage.prompt_tokens,
                    completion_tokens=outcome.usage.completion_tokens,
                    at_a_time=self._at_a_time,
                )
            )
            self._work[shape] = self._work.get(shape, 0.0) + work
            self._done += work

    def sample(self, now: float) -> None:
        """Record the work done so far; call about once a second."""
        self._samples.append((now, self._done))
        while len(self._samples) > 2 and now - self._samples[0][0] > WINDOW_SECONDS:
            self._samples.popleft()

    def seconds_left(self, pending: int) -> float | None:
        """Return the seconds that `pending` requests will take; None before the first answer."""
        if not pending:
            return 0.0
        if len(self._samples) < 2:
            return None
        (start, before), (end, now) = self._samples[0], self._samples[-1]
        if now <= before or end <= start:
            return None
        return self._pending_work(pending) / ((now - before) / (end - start))

    def _pending_work(self, pending: int) -> float:
        """Return the work of the pending requests, by shape.

        Outcomes of other runs are not known by shape, so they are assumed to have the same mix of
        shapes as the remaining requests.
        """
        left = {
            shape: max(0, expected.requests - self._seen[shape])
            for shape, expected in self._expected.items()
        }
        requests = sum(left.values())
        if not requests:
            seen = self._seen.total()
            return self._done / seen * pending if seen else 0.0
        work = sum(count * self._each(shape) for shape, count in left.items())
        return work * pending / requests

    def _each(self, shape: str) -> float:
        expected = self._expected[shape]
        prior = self._costs.seconds(expected) / expected.requests
        seen = self._seen[shape]
        return (EXPECTATION_WEIGHT * prior + self._work.get(shape, 0.0)) / (
            EXPECTATION_WEIGHT + seen
        )
