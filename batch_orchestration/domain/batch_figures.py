"""Figures of a batch over time, as its report shows them. Times are POSIX seconds."""

import msgspec

#: Widths of an interval that people can read off an axis, in seconds.
_WIDTHS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200)
_DAY = 86_400


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """How long answered requests took at their last attempt, in seconds."""

    answered: int
    p50: float
    p90: float
    p95: float
    p99: float
    longest: float


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """What became of requests in one interval; `number` counts intervals from 0."""

    number: int
    answered: int
    failed: int
    output_tokens: int


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Outcomes by the time at which they came, without those of replays.

    Attributes:
        since: When the first interval begins.
        width_seconds: Of each interval.
        intervals: Those in which there was any outcome, in order.
    """

    since: float
    width_seconds: float
    intervals: tuple[Interval, ...]


class RunFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What one run did for a batch.

    Attributes:
        first_at: Its first submission that had an outcome.
        last_at: Its last outcome.
        outcomes: That it brought.
        failed: How many of them are failures.
        handed_on: How many of them are in chunks that another run completed: this one ended before.
    """

    run_id: str
    first_at: float
    last_at: float
    outcomes: int
    failed: int
    handed_on: int


def interval_width(span_seconds: float, *, most: int) -> float:
    """Return the smallest readable width with which a span has at most so many intervals."""
    least = span_seconds / most
    for width in _WIDTHS:
        if width >= least:
            return float(width)
    return float(_DAY * -(-least // _DAY))
