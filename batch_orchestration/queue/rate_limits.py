"""Submission rates of the sources, as token buckets. The clock is passed in.

A bucket holds up to `burst` and fills at an even rate; each submission is taken out of it. A full
bucket lets a submission larger than `burst` through and owes the excess. The amount that passes in
any period is therefore at most `burst`, plus the inflow of that period, plus the excess of one
submission larger than `burst`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

SECONDS_PER_HOUR = 3600.0
#: Tolerance for rounding: far below one request, far above the error of a double.
_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A rate limit: `per_hour` in the long run, `burst` at once."""

    per_hour: float
    burst: float


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """The state of a rate limit at one moment.

    Attributes:
        level: Amount that may still pass; negative while an excess is owed.
    """

    rate: Rate
    level: float
    at: float

    @classmethod
    def after(cls, events: Iterable[tuple[float, float]], *, rate: Rate) -> "Bucket":
        """Return the bucket after these events, each a time and an amount, in any order."""
        bucket: Bucket | None = None
        for at, amount in sorted(events):
            bucket = bucket or cls(rate=rate, level=rate.burst, at=at)
            bucket = bucket.less(amount, now=at)
        return bucket or cls(rate=rate, level=rate.burst, at=0.0)

    def filled(self, now: float) -> "Bucket":
        """Return the bucket filled up to `now`; a clock set back adds nothing."""
        seconds = max(0.0, now - self.at)
        gained = seconds * self.rate.per_hour / SECONDS_PER_HOUR
        return replace(self, level=min(self.rate.burst, self.level + gained), at=max(now, self.at))

    def less(self, amount: float, *, now: float) -> "Bucket":
        """Return the bucket after an amount has passed."""
        filled = self.filled(now)
        return replace(filled, level=filled.level - amount)

    def retry_after(self, amount: float, *, now: float) -> float:
        """Return the seconds until an amount may pass; 0 if it may pass now."""
        missing = min(amount, self.rate.burst) - self.filled(now).level
        if missing <= _TOLERANCE:
            return 0.0
        # The bucket's time may be ahead of a clock that was set back.
        behind = max(0.0, self.at - now)
        return behind + missing * SECONDS_PER_HOUR / self.rate.per_hour


class SubmissionEvent(NamedTuple):
    """The admission of one file of a source."""

    source: str
    at: float
    requests: int


@dataclass(frozen=True, kw_only=True)
class SourceRates:
    """The rate limits of each source, in files and in requests, and its recent submissions."""

    submissions: Rate = Rate(per_hour=60, burst=20)
    requests: Rate = Rate(per_hour=400_000, burst=200_000)
    events: tuple[SubmissionEvent, ...] = ()

    @property
    def memory_seconds(self) -> float:
        """Minimum time for which a submission counts.

        The slower bucket fills ten times in it; it is at least 24 hours. A source that stays at its
        limit for that long may submit one `burst` more in it than the rates allow.
        """
        hours = max(rate.burst / rate.per_hour for rate in (self.submissions, self.requests))
        return SECONDS_PER_HOUR * max(24.0, 10.0 * hours)

    def retry_after(self, source: str, requests: int | None, *, now: float) -> float:
        """Return the seconds until a source may submit a file; 0 if it may submit now.

        Args:
            requests: Requests of the file; None before it is read, which counts as one.
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
        """Return the remaining allowance of a source, in words."""
        by_count, by_requests = (bucket.filled(now) for bucket in self._buckets(source, now))
        return (
            f"{source} may submit {max(0.0, by_count.level):,.0f} files"
            f" ({by_count.rate.per_hour:,.0f} an hour) and {max(0.0, by_requests.level):,.0f}"
            f" requests ({by_requests.rate.per_hour:,.0f} an hour) now"
        )

    def _buckets(self, source: str, now: float) -> tuple[Bucket, Bucket]:
        own = [event for event in self.events if event.source == source]
        # A submission in the future was recorded by a clock that was ahead.
        counts = ((min(e.at, now), 1.0) for e in own)
        requests = ((min(e.at, now), float(e.requests)) for e in own)
        return (
            Bucket.after(counts, rate=self.submissions),
            Bucket.after(requests, rate=self.requests),
        )
