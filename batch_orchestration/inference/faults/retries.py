"""Decides when a failed request is sent again, and when it is given up. Pure."""

import math
from collections import deque

import msgspec

from batch_orchestration.core.outcomes import Failure


class RetryPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Exponential back-off with full jitter.

    Delay before attempt n+1: uniform in [0, min(max_delay, base_delay · 2^(n-1))] seconds, the
    "full jitter" of AWS's architecture blog, "Exponential Backoff And Jitter".

    Attributes:
        max_retry_after_seconds: The longest wait that an engine may ask for.
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

    A wait that the engine asks for is honored up to the policy's limit, and up to half of the
    batch's remaining time, so that another attempt is made before the deadline.

    Args:
        attempts: Number of attempts made, including the failed one.
        jitter: A random number in [0, 1); passed in to keep the decision pure.
        seconds_left: Until the deadline of the request's batch.
    """
    if not failure.retryable or attempts >= policy.max_attempts:
        return None
    # After 64 doublings any delay exceeds its maximum; after 1,024 it overflows a float.
    doubled = policy.base_delay_seconds * 2.0 ** min(attempts - 1, 64)
    ceiling = min(policy.max_delay_seconds, doubled)
    delay = ceiling * jitter
    most = max(0.0, min(policy.max_retry_after_seconds, seconds_left / 2))
    return max(delay, min(failure.retry_after_seconds or 0.0, most))


class BreakerPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When to stop feeding an engine that keeps failing.

    Attributes:
        last: Number of latest attempts to judge; fewer are not judged.
        failure_rate: Share of failed attempts above which feeding stops.
        pause_seconds: Before the first probe; doubled after each failed one.
        probes: Failed probes in a row after which the engine is given up.
    """

    last: int = 50
    failure_rate: float = 0.5
    pause_seconds: float = 10.0
    max_pause_seconds: float = 120.0
    probes: int = 5


class Breaker:
    """Closed: feeding. Open: pausing until `probe_at`, then one request at a time as a probe.

    Only failures of the engine count as failed; a refused request shows that the engine works.
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
        """Whether enough probes have failed to give the engine up."""
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
        """Record how an attempt ended; late answers from before the opening count as well."""
        if self.probe_at is not None:
            self._record_while_open(failed=failed, now=now)
            return
        self._latest.append(failed)
        full = len(self._latest) == self._policy.last
        if full and sum(self._latest) / len(self._latest) > self._policy.failure_rate:
            self.probe_at = now + self._policy.pause_seconds

    def note_let_go(self) -> None:
        """Record that an attempt ended without a result; a probe may then be sent again."""
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
