"""Dagster's runs as dispatch sees them: the live ones, and the results of the others."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

import dagster as dg

from batch_orchestration.core.errors import (
    BatchNotFound,
    BatchOrchestrationError,
    DeadLetterError,
    EngineError,
    EngineKeepsDying,
    EngineRefusesUs,
    GpuUnhealthy,
    PlanMismatch,
    StorageError,
)
from batch_orchestration.defs.partitions import (
    BATCH_TAG,
    PARTITION_TAG,
    RUN_KEY_TAG,
    chunks_by_batch,
    name_tags,
)
from batch_orchestration.dispatch.run_planning import KnownRun, RunState
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.entries import WaitReason
from batch_orchestration.queue.refused_engine import describe, note_refusal
from batch_orchestration.settings import Settings

WILL_RETRY_TAG = "dagster/will_retry"
RETRIED_BY_TAG = "dagster/auto_retry_run_id"
#: Run tag: the reason not to try again. Begins with the run's id, because a re-execution inherits
#: the tags of its parent.
ASKS_PERSON_TAG = "batch_orchestration/asks_person"
#: Run tag: a run of `batch_output` that wrote partial files. Its value is the run's id, for the
#: same reason.
PARTIAL_TAG = "batch_orchestration/partial"
#: Run tag: a run that started no engine because its device was unfit. The run's id, as above.
UNFIT_TAG = "batch_orchestration/gpu_unhealthy"
#: Run tag: a run that the engine refused. The run's id, as above.
REFUSED_TAG = "batch_orchestration/engine_refuses_us"
#: Dagster's own retry appears within seconds; after this long none will come.
RETRY_SHOWS_SECONDS = 300.0
_REASON_LENGTH = 200
#: Within one run, where the engine stays loaded if it can. Requests with an outcome are not sent
#: again.
STEP_RETRIES = 2
STEP_RETRY_SECONDS = 5.0

#: Without `NOT_STARTED`: such a run was created but never queued, and requesting it again queues
#: it.
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
    """Return all live runs, and the ended runs that carry the tag of one of these batches."""
    if not batch_ids:
        return []
    live = instance.get_run_records(dg.RunsFilter(statuses=LIVE_STATUSES))
    ended = instance.get_run_records(
        dg.RunsFilter(statuses=ENDED_STATUSES, tags={BATCH_TAG: list(batch_ids)})
    )
    states = [(record, run_state(record, now=now)) for record in (*live, *ended)]
    # Dagster may create a retry after the first read and mark its parent before the second.
    retries = {record.dagster_run.tags.get(RETRIED_BY_TAG) for record in ended} - {None}
    if unseen := retries - {record.dagster_run.run_id for record in (*live, *ended)}:
        late = instance.get_run_records(dg.RunsFilter(run_ids=sorted(filter(None, unseen))))
        states += [(record, _state_of_retry(record, now=now)) for record in late]
    return [known for record, state in states for known in _known(record, state)]


def run_state(record: dg.RunRecord, *, now: float) -> RunState | None:
    """Return the state of a run; None if Dagster's retry has taken its place."""
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


def _state_of_retry(record: dg.RunRecord, *, now: float) -> RunState | None:
    """Return the state of a retry that has just been created, and may not be queued yet.

    None if Dagster failed to queue it: then it never will, and the work is requested again.
    """
    if record.dagster_run.status is not dg.DagsterRunStatus.NOT_STARTED:
        return run_state(record, now=now)
    is_new = now - record.create_timestamp.timestamp() < RETRY_SHOWS_SECONDS
    return RunState.LIVE if is_new else None


def free_run_key(instance: dg.DagsterInstance, wanted: str) -> str:
    """Return the key to request a run with: the wanted one, or the next free one.

    Dagster skips a request if any run has its key. The exception is a run that was created but
    never queued: it is then launched. The number of ended runs does not determine the key, because
    people delete runs, and retries and re-executions inherit it.

    Args:
        wanted: Ends with `#` and the number of the attempt.
    """
    work, _, number = wanted.rpartition("#")
    attempts = map(f"{work}#{{}}".format, itertools.count(int(number)))
    return next(key for key in attempts if not _is_taken(instance, key))


def _is_taken(instance: dg.DagsterInstance, key: str) -> bool:
    runs = instance.get_runs(dg.RunsFilter(tags={RUN_KEY_TAG: key}))
    return any(run.status is not dg.DagsterRunStatus.NOT_STARTED for run in runs)


@contextlib.contextmanager
def engine_errors(context: dg.OpExecutionContext, settings: Settings) -> Iterator[None]:
    """Let an error of the body decide how its run ends, and whether it is retried.

    If the device is unfit or the engine refuses every request, the run ends well, because no
    request has lost an attempt; dispatch waits until the cause is gone. If only a person can help,
    the run fails for good. After any other error of engine or store, Dagster retries the step.

    Raises:
        dg.Failure: A person must act first.
        dg.RetryRequested: The step is retried. Not by a `RetryPolicy`: Dagster honours that even
            after a person terminated the run.
        StorageError: The refusal of an engine cannot be written.
    """
    instance, run_id = context.instance, context.run.run_id
    try:
        yield
    except GpuUnhealthy as unhealthy:
        instance.add_run_tags(run_id, {UNFIT_TAG: run_id})
        context.log.warning(f"{WaitReason.GPU_UNHEALTHY}: the work waits: {unhealthy}")
    except EngineRefusesUs as refused:
        folder, now = DataFolder(settings.data_dir), time.time()
        refusal = note_refusal(refused, folder=folder, settings=settings, run_id=run_id, now=now)
        instance.add_run_tags(run_id, {REFUSED_TAG: run_id})
        context.log.warning(f"{WaitReason.ENGINE_REFUSES_US}: {describe(refusal, now=now)}")
    except (BatchNotFound, PlanMismatch, DeadLetterError, EngineKeepsDying) as error:
        reason = str(error).splitlines()[0][:_REASON_LENGTH]
        instance.add_run_tags(run_id, {ASKS_PERSON_TAG: f"{run_id}: {reason}"})
        raise dg.Failure(description=str(error), allow_retries=False) from error
    except (EngineError, StorageError) as error:
        pause = STEP_RETRY_SECONDS * 2**context.retry_number
        raise dg.RetryRequested(max_retries=STEP_RETRIES, seconds_to_wait=pause) from error


def mark_partial(instance: dg.DagsterInstance, run_id: str) -> None:
    """Mark a run that does not deliver its batch, however it ends."""
    instance.add_run_tags(run_id, {PARTIAL_TAG: run_id})


def claim_batch(
    instance: dg.DagsterInstance, run: dg.DagsterRun, batch_ids: Sequence[str], folder: DataFolder
) -> None:
    """Tag a run launched by a person with its batch, as `dispatch_sensor` tags its own runs."""
    if BATCH_TAG not in run.tags and len(batch_ids) == 1:
        instance.add_run_tags(run.run_id, tags_about(batch_ids[0], folder))


def tags_about(name: str, folder: DataFolder) -> dict[str, str]:
    """Return the tags that name a batch and its source."""
    # The run itself reports an unknown or damaged batch.
    with contextlib.suppress(BatchOrchestrationError):
        return name_tags(folder.read_plan(name))
    return {BATCH_TAG: name}


def _known(record: dg.RunRecord, state: RunState | None) -> Iterator[KnownRun]:
    run = record.dagster_run
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
