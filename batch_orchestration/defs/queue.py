"""The queue in Dagster: its overview, the reasons why batches wait, and the pausing jobs."""

import hashlib
import time
from collections.abc import Iterable, Iterator

import dagster as dg
from pydantic import Field

from batch_orchestration.defs.events import MANIFEST_KEY, halt_events
from batch_orchestration.defs.job_factory import one_op_job
from batch_orchestration.defs.metadata import metadata_of
from batch_orchestration.defs.resources import SettingsResource, data_folder
from batch_orchestration.dispatch.table import queue_markdown
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue import pause as queue_pause
from batch_orchestration.queue.entries import Pause, QueueEntry, QueueView, WaitReason
from batch_orchestration.queue.halts import halt_in_force

QUEUE_KEY = dg.AssetKey("queue_overview")
#: Dagster keeps each of them as an event.
OVERVIEW_SECONDS = 60.0

queue_overview = dg.AssetSpec(
    QUEUE_KEY,
    description=(
        "**What waits and what is at work**, in the order of service, each with its place, its "
        "reason and when its turn is expected. `dispatch_sensor` writes it when something has "
        "changed, at most once a minute; `batch-orchestration status` is always up to date."
    ),
    group_name="inbox",
    kinds={"json"},
)


class PauseConfig(dg.Config):
    """The reason for the pause."""

    reason: str = Field("", description="Shown wherever the queue is.")


@one_op_job("pause_the_queue")
def pause_queue(
    context: dg.OpExecutionContext, config: PauseConfig, settings: SettingsResource
) -> None:
    """Pause the whole queue until `resume_queue`: no file is admitted and no run is started.

    Runs at work finish the chunks that they have begun.
    """
    pause = Pause(at=time.time(), actor=f"run {context.run.run_id[:8]}", reason=config.reason)
    queue_pause.pause(data_folder(settings), pause)
    context.log.info("the queue is paused; the job resume_queue lets it go on")


@one_op_job("resume_the_queue")
def resume_queue(context: dg.OpExecutionContext, settings: SettingsResource) -> None:
    """Resume the queue after `pause_queue`."""
    before = queue_pause.unpause(data_folder(settings))
    before_it = "it was not paused" if before is None else f"{before.actor} had paused it"
    context.log.info(f"the queue goes on; {before_it}")


def report_queue(
    context: dg.SensorEvaluationContext,
    view: QueueView,
    changed: Iterable[QueueEntry],
    folder: DataFolder,
) -> None:
    """Report the queue, and the entries changed since the previous tick, to Dagster."""
    for entry in changed:
        context.instance.report_runless_asset_event(_observation(entry))
        for event in _halt_events(entry, folder):
            context.instance.report_runless_asset_event(event)
    _report_overview(context.instance, view)


def _halt_events(
    entry: QueueEntry, folder: DataFolder
) -> Iterator[dg.AssetObservation | dg.AssetCheckEvaluation]:
    if entry.reason is WaitReason.FAILURE_RATE and entry.batch_id is not None:
        halt = halt_in_force(folder, entry.batch_id)
        yield from () if halt is None else halt_events(entry.batch_id, halt)


def _observation(entry: QueueEntry) -> dg.AssetObservation:
    start = entry.expected_start
    metadata = metadata_of(
        queue_reason=str(entry.reason or "none"),
        queue_detail=entry.detail,
        queue_place=entry.place,
        expected_start=None if start is None else dg.MetadataValue.timestamp(start),
    )
    return dg.AssetObservation(MANIFEST_KEY, partition=entry.batch_id, metadata=metadata)


def _report_overview(instance: dg.DagsterInstance, view: QueueView) -> None:
    # A queue that differs only in its times is not reported again.
    shown = [(e.id, e.place, e.state, e.reason, e.pending) for e in view.entries]
    digest = hashlib.sha256(repr((shown, view.paused)).encode()).hexdigest()[:16]
    latest = instance.get_latest_materialization_event(QUEUE_KEY)
    if latest is not None:
        materialization = latest.asset_materialization
        before = materialization.metadata.get("digest") if materialization else None
        if view.at - latest.timestamp < OVERVIEW_SECONDS:
            return
        if before is not None and before.value == digest:
            return
    elif not view.entries:
        return
    metadata = metadata_of(
        queue=dg.MetadataValue.md(queue_markdown(view)),
        entries=len(view.entries),
        waiting=sum(entry.reason is not None for entry in view.entries),
        paused=view.paused is not None,
        digest=digest,
    )
    instance.report_runless_asset_event(dg.AssetMaterialization(QUEUE_KEY, metadata=metadata))
