"""Statistics of a batch over time, as its report shows them."""

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from batch_orchestration.store.store import Store

_T = TypeVar("_T", bound=msgspec.Struct)
#: Widths of an interval that are easy to read off an axis, in seconds.
_WIDTHS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200)
_DAY = 86_400


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Latencies of answered requests, from their last attempt to the answer, in seconds."""

    answered: int
    p50: float
    p90: float
    p95: float
    p99: float
    longest: float


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """Outcomes in one interval; `number` counts intervals from 0."""

    number: int
    answered: int
    failed: int
    output_tokens: int


class OutcomeHistogram(msgspec.Struct, frozen=True, kw_only=True):
    """Outcomes by time of arrival, without those of replays.

    Attributes:
        since: Start of the first interval.
        width_seconds: Width of each interval.
        intervals: Intervals with at least one outcome, in order.
    """

    since: float
    width_seconds: float
    intervals: tuple[Interval, ...]


class RunStats(msgspec.Struct, frozen=True, kw_only=True):
    """Outcomes that one run produced for a batch.

    Attributes:
        first_at: Time of the first submission that had an outcome.
        last_at: Time of the last outcome.
        failed: Outcomes that are failures.
        handed_on: Outcomes in chunks that a later run completed, because this run ended before.
    """

    run_id: str
    first_at: float
    last_at: float
    outcomes: int
    failed: int
    handed_on: int


def interval_width(span_seconds: float, *, most: int) -> float:
    """Return the smallest readable width that divides a span into at most `most` intervals."""
    least = span_seconds / most
    for width in _WIDTHS:
        if width >= least:
            return float(width)
    return float(_DAY * -(-least // _DAY))


#: Outcomes from an engine in the batch's own runs, without replays, which may be months later.
_OUTCOMES = """
    WITH outcomes AS (
        SELECT *, epoch(settled_at) AS ended, epoch(settled_at) - latency_seconds AS began
        FROM request_outcomes
        WHERE batch_id = ? AND attempts > 0 AND engine <> '' AND request_index NOT IN (
            SELECT request_index FROM failed_requests
            WHERE batch_id = ? AND replay IS NOT NULL)
    )
"""


def read_latencies(store: Store, batch_id: str) -> Latencies | None:
    """Return interpolated percentiles of the latency; None if no request was answered.

    DuckDB holds eight bytes per answered request during the query.
    """
    ((answered, percentiles, longest),) = _fetch(
        store,
        """
        SELECT count(*), quantile_cont(latency_seconds, [0.5, 0.9, 0.95, 0.99]),
            max(latency_seconds)
        FROM results WHERE batch_id = ?
        """,
        [batch_id],
    )
    if not answered:
        return None
    p50, p90, p95, p99 = percentiles
    return Latencies(answered=answered, p50=p50, p90=p90, p95=p95, p99=p99, longest=longest)


def read_outcomes(store: Store, batch_id: str, *, most: int) -> OutcomeHistogram | None:
    """Return outcomes in at most `most` intervals; None if no outcome came from an engine.

    The first interval begins at the first submission.
    """
    ((since, last),) = _fetch(
        store, f"{_OUTCOMES} SELECT min(began), max(ended) FROM outcomes", [batch_id] * 2
    )
    if since is None:
        return None
    # The last outcome is at the end of the span and must not begin an interval of its own.
    width = interval_width(last - since + 0.001, most=most)
    found = _fetch(
        store,
        f"""
        {_OUTCOMES}
        SELECT CAST(floor((ended - ?) / ?) AS BIGINT) AS number,
            count(*) FILTER (WHERE status = 'completed'),
            count(*) FILTER (WHERE status = 'failed'),
            coalesce(sum(completion_tokens), 0)::BIGINT
        FROM outcomes GROUP BY number ORDER BY number
        """,
        [batch_id, batch_id, since, width],
    )
    intervals = tuple(_struct(Interval, row) for row in found)
    return OutcomeHistogram(since=since, width_seconds=width, intervals=intervals)


def read_runs(store: Store, batch_id: str) -> list[RunStats]:
    """Return the statistics of each run of a batch, in the order of their first submissions."""
    found = _fetch(
        store,
        f"""
        {_OUTCOMES}
        SELECT outcomes.run_id, min(began), max(ended), count(*),
            count(*) FILTER (WHERE outcomes.status = 'failed'),
            count(*) FILTER (WHERE chunks.run_id <> outcomes.run_id)
        FROM outcomes JOIN chunks USING (batch_id, chunk)
        GROUP BY outcomes.run_id ORDER BY min(began), outcomes.run_id
        """,
        [batch_id] * 2,
    )
    return [_struct(RunStats, row) for row in found]


def _struct(kind: type[_T], row: tuple[Any, ...]) -> _T:
    return msgspec.convert(dict(zip(kind.__struct_fields__, row, strict=True)), kind)


def _fetch(store: Store, sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    with store.reading() as db:
        return db.execute(sql, list(parameters)).fetchall()
