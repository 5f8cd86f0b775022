"""Figures of a batch over time, added up by DuckDB: no row of a request comes into Python."""

from collections.abc import Sequence
from typing import Any

from batch_orchestration.domain.batch_figures import (
    Interval,
    Latencies,
    RunFigures,
    Throughput,
    interval_width,
)
from batch_orchestration.store.store import Store

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
