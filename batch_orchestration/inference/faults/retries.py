"""When a failed request is sent again, and when it is given up: a pure decision."""

import math
from collections import deque

import msgspec

from batch_orchestration.core.outcomes import Failure


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Exponential back-off with full jitter.

    Delay before attempt n+1: uniform in [0, min(max_delay, base_delay · 2^(n-1))] seconds, the
    "full jitter" of AWS's architecture blog, "Exponential Backoff And Jitter".

    Attributes:
        max_retry_after_seconds: What an engine may ask for at most.
    """

    max_attempts: int = 5
    base_delay_seconds: float = 0.5
    max_delay_seconds: float = 30.0
    max_retry_after_seconds: float = 600.0


def retry_delay(
    failure: Failure,
    *,
    attempts: int,
    policy: RetryPolicy,
    jitter: float,
    seconds_left: float = math.inf,
) -> float | None:
    """Return seconds to wait before the next attempt, or None to give up.

    What the engine asks for counts up to the policy's limit, and up to half of the time that the
    batch has left: so that the request is asked again before that is over.

    Args:
        failure: Of the latest attempt.
        attempts: How many attempts were made, the failed one included.
        jitter: A random number in [0, 1); passed in to keep the decision pure.
        seconds_left: Until the deadline of the request's batch.
    """
    if not failure.retryable or attempts >= policy.max_attempts:
        return None
    # Doubled 64 times any delay is beyond its maximum; 1,024 times it is beyond a float.
    doubled = policy.base_delay_seconds * 2.0 ** min(attempts - 1, 64)
    ceiling = min(policy.max_delay_seconds, doubled)
    delay = ceiling * jitter
    most = max(0.0, min(policy.max_retry_after_seconds, seconds_left / 2))
    return max(delay, min(failure.retry_after_seconds or 0.0, most))


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When to stop feeding an engine that answers with its own trouble.

    Attributes:
        last: How many attempts are looked at; nothing is concluded from fewer.
        failure_rate: Share of them that may fail, above which feeding stops.
        pause_seconds: Before the first probe; doubled after each failed one.
        max_pause_seconds: The longest pause.
        probes: Failed probes in a row after which the engine is given up.
    """

    last: int = 50
    failure_rate: float = 0.5
    pause_seconds: float = 10.0
    max_pause_seconds: float = 120.0
    probes: int = 5


class Breaker:
    """Closed: feeding. Open: pausing until `probe_at`, then one request at a time as a probe.

    Only the engine's trouble counts as failed; a refused request shows an engine that works.
    Times are of one monotonic clock, passed in.
    """

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._latest: deque[bool] = deque(maxlen=policy.last)
        self._failed_probes = 0
        self._probing = False
        #: When the next probe may be sent; None while feeding.
        self.probe_at: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether feeding is stopped."""
        return self.probe_at is not None

    @property
    def gave_up(self) -> bool:
        """Whether so many probes failed that the engine is to be given up."""
        return self._failed_probes >= self._policy.probes

    def may_submit(self, now: float) -> bool:
        """Return whether a request may be submitted now; when open, this claims the probe."""
        if self.probe_at is None:
            return True
        if self._probing or now < self.probe_at:
            return False
        self._probing = True
        return True

    def record(self, *, failed: bool, now: float) -> None:
        """Take note of how an attempt ended. Late answers of before the opening count as such."""
        if self.probe_at is not None:
            self._record_while_open(failed=failed, now=now)
            return
        self._latest.append(failed)
        full = len(self._latest) == self._policy.last
        if full and sum(self._latest) / len(self._latest) > self._policy.failure_rate:
            self.probe_at = now + self._policy.pause_seconds

    def note_let_go(self) -> None:
        """Take note that an attempt ended without a result: if it was the probe, another may be."""
        self._probing = False

    def _record_while_open(self, *, failed: bool, now: float) -> None:
        if not failed:
            self._latest.clear()
            self._failed_probes = 0
            self._probing = False
            self.probe_at = None
        elif self._probing:
            self._probing = False
            self._failed_probes += 1
            pause = self._policy.pause_seconds * 2.0 ** min(self._failed_probes, 64)
            self.probe_at = now + min(pause, self._policy.max_pause_seconds)
