"""The timeline of a batch: its events in words, in order of time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import BatchEvent
from batch_orchestration.gpu.samples import RunSample
from batch_orchestration.reports.figures import RunFigures

#: Of a longer timeline, only the first and the last moments are shown.
MOMENTS_SHOWN = 40
#: Characters of a run's id, as shown on Dagster's own pages.
_ID_LENGTH = 8


@dataclass(frozen=True)
class Moment:
    """One event of a batch, in words."""

    at: float
    what: str


def timeline(
    events: Sequence[BatchEvent], runs: Sequence[RunFigures], samples: Sequence[RunSample]
) -> list[Moment]:
    """Return all moments, oldest first; a long timeline is cut in the middle."""
    moments = [*_statuses(events), *_runs(runs, samples), *_restarts(samples)]
    moments.sort(key=lambda moment: moment.at)
    if len(moments) <= MOMENTS_SHOWN:
        return moments
    half = MOMENTS_SHOWN // 2
    left_out = len(moments) - 2 * half
    gap = Moment(moments[half].at, f"… {left_out:,} more …")
    return [*moments[:half], gap, *moments[-half:]]


def _statuses(events: Sequence[BatchEvent]) -> Iterator[Moment]:
    for event in events:
        if what := _status(event):
            yield Moment(event.at, what)


def _status(event: BatchEvent) -> str:
    by = f"by {event.actor}" + (f": {event.reason}" if event.reason else "")
    match event.to_status:
        case BatchStatus.IN_PROGRESS if event.from_status is BatchStatus.VALIDATING:
            return f"Admitted {by}"
        case BatchStatus.IN_PROGRESS:
            return f"Resumed {by}"
        case BatchStatus.FINALIZING:
            return f"Ready for delivery: {event.reason}"
        case BatchStatus.CANCELLING:
            return f"Cancelled {by}"
        case BatchStatus.COMPLETED | BatchStatus.CANCELLED | BatchStatus.EXPIRED:
            return f"Delivered, {event.to_status}: {event.reason}"
        case _:
            return ""


def _runs(runs: Sequence[RunFigures], samples: Sequence[RunSample]) -> Iterator[Moment]:
    by_id = {run.run_id: run for run in runs}
    sampled: dict[str, list[RunSample]] = {}
    for sample in samples:
        sampled.setdefault(sample.run_id, []).append(sample)
    for run_id in {**by_id, **sampled}:
        name, run, of_run = run_id[:_ID_LENGTH], by_id.get(run_id), sampled.get(run_id, [])
        if of_run:
            yield Moment(of_run[0].at, f"Run {name} at work")
        if run is None:
            # The run was alive at its last sample; its end is unknown.
            yield Moment(of_run[-1].at, f"Run {name} last seen, without an outcome")
            continue
        yield Moment(run.first_at, f"Run {name}: first submission")
        yield Moment(run.last_at, f"Run {name}: last outcome; {_brought(run)}")


def _brought(run: RunFigures) -> str:
    text = f"{run.outcomes:,} in all"
    if run.failed:
        text += f", {run.failed:,} of them failures"
    if run.handed_on:
        text += (
            f". It ended before its chunks were complete: {run.handed_on:,} of its outcomes were"
            " committed by a later run"
        )
    return text


def _restarts(samples: Sequence[RunSample]) -> Iterator[Moment]:
    """Yield a moment wherever a run's restart count is higher than in its previous sample."""
    counted: dict[str, int] = {}
    for sample in samples:
        before = counted.get(sample.run_id, 0)
        if sample.restarts > before:
            times = f", {sample.restarts - before} times" if sample.restarts > before + 1 else ""
            name = sample.run_id[:_ID_LENGTH]
            yield Moment(sample.at, f"Run {name}: engine restarted{times}")
        counted[sample.run_id] = sample.restarts
