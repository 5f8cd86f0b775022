"""Early ends and resumption of batches: jobs for people, and the checks of each tick."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

import dagster as dg
from pydantic import Field

from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.defs.events import closed_out_materialization
from batch_orchestration.defs.job_factory import one_op_job
from batch_orchestration.defs.resources import SettingsResource, data_folder, open_store
from batch_orchestration.defs.runs import tags_about
from batch_orchestration.dispatch.run_planning import KnownRun, RunState
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.lifecycle.cancellation import cancel, early_end_in_force, end_overdue
from batch_orchestration.lifecycle.close_out import fail_unanswered
from batch_orchestration.lifecycle.resumption import resume
from batch_orchestration.store.store import Store

#: Our tag on the runs of a batch that ended early: `cancelled` or `expired`.
EARLY_END_TAG = "early_end"
SENSOR_ACTOR = "dispatch_sensor"
CHUNKS_KEY = dg.AssetKey("chunk_results")


class CancelConfig(dg.Config):
    """The batch to cancel."""

    batch: str = Field(description="Id of the batch.")
    reason: str = Field("", description="Why; kept in the batch's history and in its report.")


@one_op_job("cancel_one")
def cancel_batch(
    context: dg.OpExecutionContext, config: CancelConfig, settings: SettingsResource
) -> None:
    """Cancel a batch: the answers so far are delivered.

    The other requests become rows of `errors.jsonl`. Requests in flight are dropped within seconds.
    Terminating a run of the batch has the same effect.
    """
    folder = data_folder(settings)
    context.instance.add_run_tags(context.run.run_id, tags_about(config.batch, folder))
    cancellation = cancel(
        config.batch,
        folder=folder,
        store=open_store(settings),
        actor=context.run.run_id,
        reason=config.reason,
        at=time.time(),
    )
    already = "already " if cancellation.earlier else ""
    context.log.info(f"{config.batch} is {already}{cancellation.early_end}")


class ResumeConfig(dg.Config):
    """The batch to resume."""

    batch: str = Field(description="Id of a batch that is paused, cancelled or expired.")
    completion_window: str = Field(
        "", description="A new window, like 24h, counted from now; an expired batch needs it."
    )
    max_failure_rate: float | None = Field(
        None, description="A new limit, 0 to 1, for the remaining requests; 1 never pauses it."
    )
    reason: str = Field("", description="Why; kept in the batch's history.")


@one_op_job("resume_one")
def resume_batch(
    context: dg.OpExecutionContext, config: ResumeConfig, settings: SettingsResource
) -> None:
    """Continue a batch that is paused or ended early.

    Only requests without an answer are sent. The output files are written again when every request
    is answered.
    """
    folder = data_folder(settings)
    context.instance.add_run_tags(context.run.run_id, tags_about(config.batch, folder))
    try:
        resume(
            config.batch,
            folder=folder,
            store=open_store(settings),
            actor=context.run.run_id,
            reason=config.reason,
            completion_window=config.completion_window or None,
            max_failure_rate=config.max_failure_rate,
            at=time.time(),
        )
    except ValueError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    context.log.info(f"{config.batch} continues")


def end_due_batches(
    instance: dg.DagsterInstance,
    batches: Sequence[BatchRecord],
    runs: Iterable[KnownRun],
    *,
    folder: DataFolder,
    store: Store,
    now: float,
    doubt: str | None = None,
    faults: Faults | None = None,
) -> tuple[list[KnownRun], dict[str, EarlyEnd]]:
    """End the batches that are due; return the runs after that, and all early ends.

    A batch is due if its window is over or if a person terminated one of its runs. Queued runs
    whose batches all end early are canceled. While the clock is in doubt, no window is over. A
    batch with an unreadable decision is added to `faults` and left as it is.
    """
    faults = faults or Faults()
    since: dict[str, float] = {}
    readable = []
    for batch in batches:
        with faults.of(batch.batch_id):
            if (found := folder.resumption(batch.batch_id).read()) is not None:
                since[batch.batch_id] = found.at
            readable.append(batch)
    known = [_superseded(run, since.get(run.batch_id, 0.0)) for run in runs]
    early_ends = end_overdue(
        readable,
        folder=folder,
        store=store,
        terminated={
            run.batch_id: run.run_id
            for run in reversed(known)
            if run.terminated and run.chunks is not None
        },
        actor=SENSOR_ACTOR,
        now=now,
        doubt=doubt,
        faults=faults,
    )
    taken = _cancel_queued(instance, known, early_ends)
    return [_stopped(run) if run.run_id in taken else run for run in known], early_ends


def _superseded(run: KnownRun, resumed_at: float) -> KnownRun:
    over = run.state is not RunState.LIVE and run.ended_at <= resumed_at
    return replace(run, state=RunState.SUPERSEDED, terminated=False) if over else run


def _cancel_queued(
    instance: dg.DagsterInstance, runs: Sequence[KnownRun], early_ends: Collection[str]
) -> set[str]:
    """Cancel the queued chunk runs whose batches all end early."""
    waiting = {run.run_id for run in runs if run.queued and run.chunks is not None}
    waiting -= {run.run_id for run in runs if run.batch_id not in early_ends}
    if not waiting:
        return set()
    queued = dg.RunsFilter(run_ids=[*waiting], statuses=[dg.DagsterRunStatus.QUEUED])
    taken = instance.get_runs(queued)
    for run in taken:
        instance.report_run_canceling(run, "Its batch ends early.")
        instance.report_run_canceled(run, "Its batch ends early; nothing of the run had begun.")
    return {run.run_id for run in taken}


def _stopped(run: KnownRun) -> KnownRun:
    return replace(run, state=RunState.STOPPED, queued=False)


def tag_early_end(instance: dg.DagsterInstance, run_id: str, early_end: EarlyEnd) -> None:
    """Tag a run with its batch's early end, so that the runs page shows it."""
    instance.add_run_tags(run_id, {EARLY_END_TAG: str(early_end.status)})


def close_out_chunks(
    instance: dg.DagsterInstance,
    batch_id: str,
    *,
    folder: DataFolder,
    store: Store,
    run_id: str,
) -> Iterator[dg.AssetMaterialization]:
    """Fail the unanswered requests of a batch that ends early; yield the event of each such chunk.

    A batch that does not end early is left as it is and yields nothing.
    """
    early_end = early_end_in_force(folder, store.batch(batch_id))
    if early_end is None:
        return
    tag_early_end(instance, run_id, early_end)
    plan = folder.read_plan(batch_id)
    for report in fail_unanswered(
        batch_id, folder=folder, store=store, run_id=run_id, clock=time.time
    ):
        yield closed_out_materialization(CHUNKS_KEY, report, early_end, plan=plan)
