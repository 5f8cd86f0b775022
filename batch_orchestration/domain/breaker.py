"""A circuit breaker: an engine that fails most of what it is given is given less, then nothing."""

from collections import deque

import msgspec


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
