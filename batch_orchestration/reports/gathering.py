"""Gathers the figures of a report from store and disk; each of them may fail independently."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.lifecycle import FINAL, BatchEvent
from batch_orchestration.core.results import BatchTotals
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.samples import RunSample, read_samples
from batch_orchestration.reports.documents import Picture
from batch_orchestration.reports.figures import FigureTables, Latencies, RunFigures, Throughput
from batch_orchestration.reports.plots import (
    MOST_INTERVALS,
    Plot,
    draw,
    engine_plot,
    gpu_plot,
    throughput_plot,
)
from batch_orchestration.reports.timeline import Moment, timeline
from batch_orchestration.store.store import Store
from batch_orchestration.workers.utilization import Utilization
from batch_orchestration.workers.utilization_files import utilization_of

logger = logging.getLogger(__name__)

Figure = TypeVar("Figure")


@dataclass(frozen=True, kw_only=True)
class ReportFigures:
    """A batch over time. An unknown figure is empty or None, and its section is left out.

    Attributes:
        timeline: Events, oldest first. The final status is missing: it is set after the report.
    """

    timeline: Sequence[Moment] = ()
    latencies: Latencies | None = None
    throughput: Throughput | None = None
    kept: Utilization | None = None
    pictures: Sequence[Picture] = ()


def gather_figures(
    plan: BatchPlan, totals: BatchTotals, *, folder: DataFolder, store: Store
) -> ReportFigures:
    """Return the known figures of a batch over time. Errors are logged, never raised.

    The result is reproducible unless requests were replayed, or files removed by their age.
    """
    batch_id, figures = plan.batch_id, FigureTables(store)

    def known(what: str, look: Callable[[], Figure], otherwise: Figure) -> Figure:
        try:
            return look()
        except Exception as error:  # noqa: BLE001 - a missing figure must not stop a delivery
            logger.warning("the report of %s is without %s: %r", batch_id, what, error)
            return otherwise

    throughput = known(
        "throughput", lambda: figures.throughput(batch_id, most=MOST_INTERVALS), None
    )
    samples: list[RunSample] = known(
        "samples", lambda: _samples(batch_id, folder, until=totals.last_at), []
    )
    events: list[BatchEvent] = known("events", lambda: _events(batch_id, store), [])
    runs: list[RunFigures] = known("runs", lambda: figures.runs(batch_id), [])
    since = throughput.since if throughput else plan.created_at
    plots: tuple[Callable[[], Plot | None], ...] = (
        lambda: throughput_plot(throughput),
        lambda: engine_plot(samples, since=since),
        lambda: gpu_plot(samples, since=since),
    )
    return ReportFigures(
        timeline=known("timeline", lambda: timeline(events, runs, samples), []),
        latencies=known("latencies", lambda: figures.latencies(batch_id), None),
        throughput=throughput,
        kept=known("lost time", lambda: utilization_of(folder, batch_id), None),
        pictures=[picture for plot in plots if (picture := _drawn(plot, batch_id))],
    )


def _events(batch_id: str, store: Store) -> list[BatchEvent]:
    events = store.batch_events(batch_id)
    # The final status exists only on a second delivery, which must give the same bytes.
    return events[:-1] if events and events[-1].to_status in FINAL else events


def _samples(batch_id: str, folder: DataFolder, *, until: float | None) -> list[RunSample]:
    """Return the samples up to the last outcome, because later ones may still be written."""
    return [] if until is None else read_samples(folder, batch_id, until=until)


def _drawn(plot_of: Callable[[], Plot | None], batch_id: str) -> Picture | None:
    try:
        plot = plot_of()
        return Picture(plot.name, plot.title, draw(plot)) if plot else None
    except Exception as error:  # noqa: BLE001 - a missing picture must not stop a delivery
        logger.warning("the report of %s is without a plot: %s", batch_id, error)
        return None
