"""The timeline of a batch: its events in words, in order of time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import BatchEvent
from batch_orchestration.gpu.samples import RunSample
from batch_orchestration.reports.statistics import RunStats

#: Of a longer timeline, only the first and the last events are shown.
EVENTS_SHOWN = 40
#: Characters of a run's id, as shown on Dagster's own pages.
_ID_LENGTH = 8


@dataclass(frozen=True)
class TimelineEvent:
    """One event of a batch, in words."""

    at: float
    text: str


def timeline(
    events: Sequence[BatchEvent], runs: Sequence[RunStats], samples: Sequence[RunSample]
) -> list[TimelineEvent]:
    """Return all events, oldest first; a long timeline is cut in the middle."""
    found = [*_statuses(events), *_runs(runs, samples), *_restarts(samples)]
    found.sort(key=lambda event: event.at)
    if len(found) <= EVENTS_SHOWN:
        return found
    half = EVENTS_SHOWN // 2
    gap = TimelineEvent(found[half].at, f"… {len(found) - 2 * half:,} more …")
    return [*found[:half], gap, *found[-half:]]


def _statuses(events: Sequence[BatchEvent]) -> Iterator[TimelineEvent]:
    for event in events:
        if text := _status(event):
            yield TimelineEvent(event.at, text)


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


def _runs(runs: Sequence[RunStats], samples: Sequence[RunSample]) -> Iterator[TimelineEvent]:
    by_id = {run.run_id: run for run in runs}
    sampled: dict[str, list[RunSample]] = {}
    for sample in samples:
        sampled.setdefault(sample.run_id, []).append(sample)
    for run_id in {**by_id, **sampled}:
        name, run, of_run = run_id[:_ID_LENGTH], by_id.get(run_id), sampled.get(run_id, [])
        if of_run:
            yield TimelineEvent(of_run[0].at, f"Run {name}: first sample")
        if run is None:
            # The run was alive at its last sample; its end is unknown.
            yield TimelineEvent(of_run[-1].at, f"Run {name}: last sample; no outcome")
            continue
        yield TimelineEvent(run.first_at, f"Run {name}: first submission")
        yield TimelineEvent(run.last_at, f"Run {name}: last outcome; {_outcomes(run)}")


def _outcomes(run: RunStats) -> str:
    text = f"{run.outcomes:,} in all"
    if run.failed:
        text += f", {run.failed:,} of them failures"
    if run.handed_on:
        text += (
            f". It ended before its chunks were complete: {run.handed_on:,} of its outcomes were"
            " committed by a later run"
        )
    return text


def _restarts(samples: Sequence[RunSample]) -> Iterator[TimelineEvent]:
    """Yield an event wherever a run's restart count is higher than in its previous sample."""
    counted: dict[str, int] = {}
    for sample in samples:
        before = counted.get(sample.run_id, 0)
        if sample.restarts > before:
            times = f", {sample.restarts - before} times" if sample.restarts > before + 1 else ""
            name = sample.run_id[:_ID_LENGTH]
            yield TimelineEvent(sample.at, f"Run {name}: engine restarted{times}")
        counted[sample.run_id] = sample.restarts
