"""Figures of a batch over time, as its report shows them. Times are POSIX seconds."""

from collections.abc import Sequence
from typing import Any

import msgspec

from batch_orchestration.store.store import Store

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


#: Outcomes that an engine gave in the batch's own runs. A replay may be months later.
_OUTCOMES = """
    WITH outcomes AS (
        SELECT *, epoch(settled_at) AS ended, epoch(settled_at) - latency_seconds AS began
        FROM request_outcomes
        WHERE batch_id = ? AND attempts > 0 AND engine <> '' AND request_index NOT IN (
            SELECT request_index FROM failed_requests
            WHERE batch_id = ? AND replay IS NOT NULL)
    )
"""


class FigureTables:
    """The part of the store that reports rest on. Methods raise as those of `Store` do."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def latencies(self, batch_id: str) -> Latencies | None:
        """Return percentiles of the latency, those between two requests interpolated.

        DuckDB holds eight bytes per answered request meanwhile. None if nothing was answered.
        """
        ((answered, percentiles, longest),) = self._fetch(
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

    def throughput(self, batch_id: str, *, most: int) -> Throughput | None:
        """Return what was settled in at most so many intervals; None if an engine settled nothing.

        The first interval begins with the first submission.
        """
        ((since, last),) = self._fetch(
            f"{_OUTCOMES} SELECT min(began), max(ended) FROM outcomes", [batch_id] * 2
        )
        if since is None:
            return None
        # The last outcome is at the very end of the span, and must not begin an interval.
        width = interval_width(last - since + 0.001, most=most)
        found = self._fetch(
            f"""
            {_OUTCOMES}
            SELECT CAST(floor((ended - ?) / ?) AS BIGINT) AS number,
                count(*) FILTER (WHERE status = 'completed'),
                count(*) FILTER (WHERE status = 'failed'),
                coalesce(sum(completion_tokens), 0)
            FROM outcomes GROUP BY number ORDER BY number
            """,
            [batch_id, batch_id, since, width],
        )
        intervals = tuple(
            Interval(number=number, answered=answered, failed=failed, output_tokens=int(tokens))
            for number, answered, failed, tokens in found
        )
        return Throughput(since=since, width_seconds=width, intervals=intervals)

    def runs(self, batch_id: str) -> list[RunFigures]:
        """Return what each run did for a batch, in the order of their first submissions."""
        found = self._fetch(
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
        return [
            RunFigures(
                run_id=run_id,
                first_at=first_at,
                last_at=last_at,
                outcomes=outcomes,
                failed=failed,
                handed_on=handed_on,
            )
            for run_id, first_at, last_at, outcomes, failed, handed_on in found
        ]

    def _fetch(self, sql: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._store.reading() as db:
            return db.execute(sql, list(parameters)).fetchall()
