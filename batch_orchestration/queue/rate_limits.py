"""Rates: how much each source may submit in a time. Token buckets; the clock is passed in.

A bucket holds up to `burst`, and fills at an even rate. What is submitted is taken out of it; what
is more than a full bucket is let through by a full one, and owed. So in any stretch of time no more
passes than `burst`, what flowed in during it, and the excess of one that was larger than `burst`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

SECONDS_PER_HOUR = 3600.0
#: Of rounding: far below one request, far above the error of a double.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How much may pass: `per_hour` in the long run, `burst` at once."""

    per_hour: float
    burst: float


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """What is left of a rate at a moment.

    Attributes:
        level: Negative while it is owed.
        at: POSIX seconds.
    """

    rate: Rate
    level: float
    at: float

    @classmethod
    def after(cls, events: Iterable[tuple[float, float]], *, rate: Rate) -> "Bucket":
        """Return the bucket that these events left, each a moment and an amount, in any order."""
        bucket: Bucket | None = None
        for at, amount in sorted(events):
            bucket = bucket or cls(rate=rate, level=rate.burst, at=at)
            bucket = bucket.less(amount, now=at)
        return bucket or cls(rate=rate, level=rate.burst, at=0.0)

    def filled(self, now: float) -> "Bucket":
        """Return the bucket as it is now; a clock that went back fills nothing."""
        seconds = max(0.0, now - self.at)
        gained = seconds * self.rate.per_hour / SECONDS_PER_HOUR
        return replace(self, level=min(self.rate.burst, self.level + gained), at=max(now, self.at))

    def less(self, amount: float, *, now: float) -> "Bucket":
        """Return the bucket after something passed."""
        filled = self.filled(now)
        return replace(filled, level=filled.level - amount)

    def retry_after(self, amount: float, *, now: float) -> float:
        """Return in how many seconds so much may pass; 0 if it may now."""
        missing = min(amount, self.rate.burst) - self.filled(now).level
        if missing <= _TOLERANCE:
            return 0.0
        # The bucket's own clock may be ahead of one that went back.
        behind = max(0.0, self.at - now)
        return behind + missing * SECONDS_PER_HOUR / self.rate.per_hour


class SubmissionEvent(NamedTuple):
    """Somebody's file was admitted; `at` in POSIX seconds."""

    source: str
    at: float
    requests: int


@dataclass(frozen=True, kw_only=True)
class RateLimits:
    """What each source may submit, by count and by requests."""

    submissions: Rate = Rate(per_hour=60, burst=20)
    requests: Rate = Rate(per_hour=400_000, burst=200_000)

    @property
    def memory_seconds(self) -> float:
        """How long a submission counts at least: a full bucket has filled ten times by then.

        Who was at the limit all that time may submit one `burst` more in it than the rates say.
        """
        hours = max(rate.burst / rate.per_hour for rate in (self.submissions, self.requests))
        return SECONDS_PER_HOUR * max(24.0, 10.0 * hours)


@dataclass(frozen=True, kw_only=True)
class SourceRates:
    """What each source has submitted of late, so what it may submit now."""

    limits: RateLimits
    events: tuple[SubmissionEvent, ...] = ()

    def retry_after(self, source: str, requests: int | None, *, now: float) -> float:
        """Return in how many seconds a source may submit a file; 0 if it may now.

        Args:
            source: Who.
            requests: Of the file; None while nobody has read it: then one is enough.
            now: POSIX seconds.
        """
        by_count, by_requests = self._buckets(source, now)
        return max(
            by_count.retry_after(1, now=now),
            by_requests.retry_after(1 if requests is None else requests, now=now),
        )

    def plus(self, source: str, requests: int, *, now: float) -> "SourceRates":
        """Return the rates after one more submission."""
        return replace(self, events=(*self.events, SubmissionEvent(source, now, requests)))

    def describe(self, source: str, *, now: float) -> str:
        """Return what a source has left, in words."""
        by_count, by_requests = (bucket.filled(now) for bucket in self._buckets(source, now))
        return (
            f"{source} may submit {max(0.0, by_count.level):,.0f} files"
            f" ({by_count.rate.per_hour:,.0f} an hour) and {max(0.0, by_requests.level):,.0f}"
            f" requests ({by_requests.rate.per_hour:,.0f} an hour) now"
        )

    def _buckets(self, source: str, now: float) -> tuple[Bucket, Bucket]:
        own = [event for event in self.events if event.source == source]
        # What was submitted in the future, was by a clock that was ahead.
        counts = ((min(e.at, now), 1.0) for e in own)
        requests = ((min(e.at, now), float(e.requests)) for e in own)
        return (
            Bucket.after(counts, rate=self.limits.submissions),
            Bucket.after(requests, rate=self.limits.requests),
        )
