"""Gathers the statistics of a report from store and disk; each of them may fail independently."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.lifecycle import FINAL, BatchEvent
from batch_orchestration.core.results import BatchTotals
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.samples import RunSample, read_samples
from batch_orchestration.reports.plots import (
    MOST_INTERVALS,
    Picture,
    draw,
    engine_plot,
    gpu_plot,
    throughput_plot,
)
from batch_orchestration.reports.statistics import (
    Latencies,
    RunStats,
    read_latencies,
    read_outcomes,
    read_runs,
)
from batch_orchestration.reports.timeline import TimelineEvent, timeline
from batch_orchestration.store.store import Store
from batch_orchestration.workers.utilization import Utilization
from batch_orchestration.workers.utilization_files import utilization_of

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class BatchStats:
    """A batch over time. Unknown statistics are empty or None, and their section is left out.

    Attributes:
        timeline: Events, oldest first. The final status is missing: it is set after the report.
    """

    timeline: Sequence[TimelineEvent] = ()
    latencies: Latencies | None = None
    utilization: Utilization | None = None
    pictures: Sequence[Picture] = ()


def gather_stats(
    plan: BatchPlan, totals: BatchTotals, *, folder: DataFolder, store: Store
) -> BatchStats:
    """Return the known statistics of a batch. Errors are logged, never raised.

    The result is reproducible unless requests were replayed, or files removed by their age.
    """
    batch_id = plan.batch_id

    def known(name: str, read: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - an incomplete report must not stop a delivery
            logger.warning("the report of %s has no %s: %r", batch_id, name, error)
            return otherwise

    outcomes = known(
        "throughput", lambda: read_outcomes(store, batch_id, most=MOST_INTERVALS), None
    )
    samples: list[RunSample] = known(
        "samples", lambda: _samples(batch_id, folder, until=totals.last_at), []
    )
    events: list[BatchEvent] = known("events", lambda: _events(batch_id, store), [])
    runs: list[RunStats] = known("runs", lambda: read_runs(store, batch_id), [])
    since = outcomes.since if outcomes else plan.created_at
    plots = {
        "plot of the throughput": lambda: draw(throughput_plot(outcomes)),
        "plot of the engine": lambda: draw(engine_plot(samples, since=since)),
        "plot of the GPUs": lambda: draw(gpu_plot(samples, since=since)),
    }
    pictures = [known(name, picture, None) for name, picture in plots.items()]
    return BatchStats(
        timeline=known("timeline", lambda: timeline(events, runs, samples), []),
        latencies=known("latencies", lambda: read_latencies(store, batch_id), None),
        utilization=known("utilization", lambda: utilization_of(folder, batch_id), None),
        pictures=[picture for picture in pictures if picture is not None],
    )


def _events(batch_id: str, store: Store) -> list[BatchEvent]:
    events = store.batch_events(batch_id)
    # The final status exists only on a second delivery, which must give the same bytes.
    return events[:-1] if events and events[-1].to_status in FINAL else events


def _samples(batch_id: str, folder: DataFolder, *, until: float | None) -> list[RunSample]:
    """Return the samples up to the last outcome, because later ones may still be written."""
    return [] if until is None else read_samples(folder, batch_id, until=until)
