"""Dagster's runs as dispatch sees them: which are live, and how the others ended."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import dagster as dg

from batch_orchestration.core.errors import BatchOrchestrationError, EngineRefusesUs
from batch_orchestration.defs.partitions import (
    BATCH_TAG,
    PARTITION_TAG,
    RUN_KEY_TAG,
    chunks_by_batch,
    name_tags,
)
from batch_orchestration.dispatch.dispatch import KnownRun, RunState
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.entries import WaitReason
from batch_orchestration.queue.refused_engine import describe, note_refusal
from batch_orchestration.settings import Settings

WILL_RETRY_TAG = "dagster/will_retry"
RETRIED_BY_TAG = "dagster/auto_retry_run_id"
#: Run tag: why it makes no sense to try again. Begins with the run's id, for a re-execution
#: inherits the tags of its parent.
ASKS_PERSON_TAG = "batch_orchestration/asks_person"
#: Run tag: a run of `batch_output` that wrote partial files. Begins with the run's id, as above.
PARTIAL_TAG = "batch_orchestration/partial"
#: Run tag: a run that started no engine, for its device was not fit. As above.
UNFIT_TAG = "batch_orchestration/gpu_unhealthy"
#: Run tag: a run that the engine did not let in. As above.
REFUSED_TAG = "batch_orchestration/engine_refuses_us"
#: Dagster's own retry shows within seconds; after this long nobody is coming.
RETRY_SHOWS_SECONDS = 300.0
_REASON_LENGTH = 200
#: Within one run, where the engine stays loaded if it can. What has an outcome is not asked again.
STEP_RETRIES = 2
STEP_RETRY_SECONDS = 5.0

#: Not `NOT_STARTED`: such a run was created but never queued, and asking for it again queues it.
LIVE_STATUSES = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
ENDED_STATUSES = [
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELED,
]


def known_runs(
    instance: dg.DagsterInstance, batch_ids: Sequence[str], *, now: float
) -> list[KnownRun]:
    """Return the runs of these batches: all live ones, and the ended ones that carry their tag."""
    if not batch_ids:
        return []
    live = instance.get_run_records(dg.RunsFilter(statuses=LIVE_STATUSES))
    ended = instance.get_run_records(
        dg.RunsFilter(statuses=ENDED_STATUSES, tags={BATCH_TAG: list(batch_ids)})
    )
    return [known for record in (*live, *ended) for known in _known(record, now)]


def run_state(record: dg.RunRecord, *, now: float) -> RunState | None:
    """Return what became of a run; None if Dagster's retry of it has taken its place."""
    run = record.dagster_run
    if run.status in LIVE_STATUSES:
        return RunState.LIVE
    if run.status is dg.DagsterRunStatus.SUCCESS:
        if run.tags.get(UNFIT_TAG) == run.run_id:
            return RunState.UNFIT
        refused = run.tags.get(REFUSED_TAG) == run.run_id
        return RunState.REFUSED if refused else RunState.SUCCEEDED
    if run.status is dg.DagsterRunStatus.CANCELED or _question(run):
        return RunState.STOPPED
    if run.tags.get(WILL_RETRY_TAG) == "true":
        if RETRIED_BY_TAG in run.tags:
            return None
        if now - (record.end_time or 0.0) < RETRY_SHOWS_SECONDS:
            return RunState.LIVE
    return RunState.FAILED


def free_run_key(instance: dg.DagsterInstance, wanted: str) -> str:
    """Return the key to ask for a run with: the wanted one, or the next one that is free.

    Dagster skips a request whose key any run has, but for a run that was created and never queued:
    that one is then launched. How many runs have ended does not tell, for people delete runs, and
    retries and re-executions inherit the key.

    Args:
        instance: Of Dagster.
        wanted: Ends with `#` and the number of the attempt.
    """
    work, _, number = wanted.rpartition("#")
    attempts = map(f"{work}#{{}}".format, itertools.count(int(number)))
    return next(key for key in attempts if not _is_taken(instance, key))


def _is_taken(instance: dg.DagsterInstance, key: str) -> bool:
    runs = instance.get_runs(dg.RunsFilter(tags={RUN_KEY_TAG: key}))
    return any(run.status is not dg.DagsterRunStatus.NOT_STARTED for run in runs)


def ask_person(instance: dg.DagsterInstance, run_id: str, reason: str) -> None:
    """Keep dispatch from trying again what this run failed at, until a person has looked."""
    text = f"{run_id}: {reason.splitlines()[0][:_REASON_LENGTH]}"
    instance.add_run_tags(run_id, {ASKS_PERSON_TAG: text})


def retry_step(context: dg.OpExecutionContext) -> dg.RetryRequested:
    """Return what to raise so that Dagster tries the step again, after a growing pause.

    Not a `RetryPolicy`: Dagster honours that even after a person terminated the run.
    """
    return dg.RetryRequested(
        max_retries=STEP_RETRIES, seconds_to_wait=STEP_RETRY_SECONDS * 2**context.retry_number
    )


def mark_partial(instance: dg.DagsterInstance, run_id: str) -> None:
    """Tell dispatch that this run does not deliver its batch, however it ends."""
    instance.add_run_tags(run_id, {PARTIAL_TAG: run_id})


def mark_unfit(instance: dg.DagsterInstance, run_id: str) -> None:
    """Tell dispatch that this run ended because its device was not fit for an engine."""
    instance.add_run_tags(run_id, {UNFIT_TAG: run_id})


def wait_for_the_gate(
    context: dg.OpExecutionContext | dg.AssetExecutionContext,
    refused: EngineRefusesUs,
    settings: Settings,
) -> None:
    """End a run that the engine did not let in as well: everybody waits until it does again.

    Raises:
        StorageError: That cannot be kept.
    """
    folder, now = DataFolder(settings.data_dir), time.time()
    refusal = note_refusal(
        refused, folder=folder, settings=settings, run_id=context.run.run_id, now=now
    )
    context.instance.add_run_tags(context.run.run_id, {REFUSED_TAG: context.run.run_id})
    context.log.warning(f"{WaitReason.ENGINE_REFUSES_US}: {describe(refusal, now=now)}")


def claim_batch(
    instance: dg.DagsterInstance, run: dg.DagsterRun, batch_ids: Sequence[str], folder: DataFolder
) -> None:
    """Tag a run that a person launched with its batch, as those of `dispatch_sensor` are."""
    if BATCH_TAG not in run.tags and len(batch_ids) == 1:
        instance.add_run_tags(run.run_id, tags_about(batch_ids[0], folder))


def tags_about(name: str, folder: DataFolder) -> dict[str, str]:
    """Return the tags that name a batch, and its source."""
    # Of what is unknown or damaged the run itself tells.
    with contextlib.suppress(BatchOrchestrationError):
        return name_tags(folder.read_plan(name))
    return {BATCH_TAG: name}


def _known(record: dg.RunRecord, now: float) -> Iterator[KnownRun]:
    run, state = record.dagster_run, run_state(record, now=now)
    if state is None or run.tags.get(PARTIAL_TAG) == run.run_id:
        return
    work: Mapping[str, range | None] = chunks_by_batch(run.tags)
    if not work and (batch_id := run.tags.get(PARTITION_TAG)):
        work = {batch_id: None}
    for batch_id, chunks in work.items():
        yield KnownRun(
            run_id=run.run_id,
            batch_id=batch_id,
            chunks=chunks,
            state=state,
            ended_at=record.end_time or 0.0,
            reason=_question(run) or "was terminated",
            queued=run.status is dg.DagsterRunStatus.QUEUED,
            terminated=run.status is dg.DagsterRunStatus.CANCELED,
        )


def _question(run: dg.DagsterRun) -> str | None:
    run_id, separator, reason = run.tags.get(ASKS_PERSON_TAG, "").partition(": ")
    return reason if separator and run_id == run.run_id else None
