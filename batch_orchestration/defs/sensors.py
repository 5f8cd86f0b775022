"""Sensors: from the inbox to admission, and from the store to the runs that batches need."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence

import dagster as dg

from batch_orchestration.admission.claims import Claim
from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.core.errors import StorageError, StoreDamaged, StoreLocked
from batch_orchestration.core.fault_isolation import Faults, MemberFault
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.defs.events import manifest_materialization
from batch_orchestration.defs.job_factory import config_of
from batch_orchestration.defs.jobs import (
    admit_batch,
    answer_chunks,
    deliver_batch,
)
from batch_orchestration.defs.lifecycle import end_due_batches
from batch_orchestration.defs.partitions import (
    add_partitions,
    batch_tags,
    has_partitions,
    range_tags,
)
from batch_orchestration.defs.queue import report_queue
from batch_orchestration.defs.resources import SettingsResource, data_folder, open_store
from batch_orchestration.defs.runs import LIVE_STATUSES, free_run_key, known_runs, run_state
from batch_orchestration.dispatch.queue_building import (
    claim_admissible,
    in_order_of_service,
    run_priorities,
)
from batch_orchestration.dispatch.refresh import refresh_queue
from batch_orchestration.dispatch.run_planning import (
    MAX_FAILURES,
    NeededRun,
    RunState,
    backoff_left,
    dispatch,
)
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.lifecycle.clock import EXPIRY_SECONDS, clock_doubt
from batch_orchestration.lifecycle.resumption import finish_resumptions
from batch_orchestration.lifecycle.unfinished import keep_index
from batch_orchestration.queue.entries import NeedsAttention, QueueView, WaitReason
from batch_orchestration.queue.files import write_needs_attention
from batch_orchestration.queue.halts import halts_in_force
from batch_orchestration.queue.load import closed_gate
from batch_orchestration.queue.pause import read_pause
from batch_orchestration.queue.refused_engine import look_again
from batch_orchestration.settings import Settings

CLAIM_TAG = "claim"
#: The shortest interval that Dagster's sensor loop can keep.
INTERVAL_SECONDS = 5
#: A tick has 60 s in all; the tick reports a store that is locked longer.
STORE_DEADLINE_SECONDS = 5.0
#: More would not be read.
SHOWN_REASONS = 20


@dg.sensor(
    job=admit_batch,
    minimum_interval_seconds=INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Claims each complete file of the inbox and asks for its admission by `admit_batch`. "
        "A skipped tick says which files wait, and why."
    ),
)
def inbox_sensor(
    context: dg.SensorEvaluationContext, settings: SettingsResource
) -> dg.SensorResult | dg.SkipReason:
    """Claim complete files and request their admission; only stat and rename, never read."""
    folder = data_folder(settings)
    inbox, now, faults = Inbox(folder, settings), time.time(), Faults()
    reasons = _claim(settings, inbox, now=now)
    reasons += [f"{waiting.name}: {waiting.reason}" for waiting in inbox.waiting(now=now)]
    requests = []
    for claim in inbox.claims(faults):
        with faults.of(claim.claim_id):
            request = _admission(context.instance, claim, now=now)
            if isinstance(request, str):
                reasons.append(request)
            else:
                requests.append(request)
    reasons += map(str, faults)
    return _result(context, requests, reasons, idle=f"nothing new in {folder.inbox}")


def _claim(settings: Settings, inbox: Inbox, *, now: float) -> list[str]:
    """Claim the files for which there is capacity; return the reasons why the others wait."""
    try:
        waiting = claim_admissible(
            folder=data_folder(settings),
            store=open_store(settings, deadline_seconds=STORE_DEADLINE_SECONDS),
            inbox=inbox,
            settings=settings,
            now=now,
        )
    except StorageError as error:
        return [f"files wait, because it is not known whether there is capacity for them: {error}"]
    return [f"{entry.id}: {entry.reason}, {entry.detail}" for entry in waiting]


def _admission(instance: dg.DagsterInstance, claim: Claim, *, now: float) -> dg.RunRequest | str:
    """Return the run that admits a claim, or the reason why it waits.

    The run is requested until the claim is gone, always with the key of the present attempt. The
    file is therefore neither lost nor admitted twice, whatever is killed in between.
    """
    states = _admissions(instance, claim, now=now)
    ended = [record.end_time or 0.0 for state, record in states if state is not RunState.LIVE]
    if len(ended) < len(states):
        return f"{claim.file_name}: being admitted"
    if ended and (wait := backoff_left(len(ended), max(ended), now=now)) > 0:
        why = f" ({claim.attempts})" if claim.attempts.failed else ""
        return f"{claim.file_name}: {len(ended)} admissions failed{why}; the next in {wait:.0f} s"
    return dg.RunRequest(
        run_key=free_run_key(instance, f"{claim.claim_id}#{len(ended)}"),
        run_config=config_of(admit_batch, claim_id=claim.claim_id),
        tags={CLAIM_TAG: claim.claim_id},
    )


def _admissions(
    instance: dg.DagsterInstance, claim: Claim, *, now: float
) -> list[tuple[RunState, dg.RunRecord]]:
    """Return the admission runs of a claim, each with its state."""
    records = instance.get_run_records(dg.RunsFilter(tags={CLAIM_TAG: claim.claim_id}))
    return [(state, record) for record in records if (state := run_state(record, now=now))]


def _failing_admissions(
    instance: dg.DagsterInstance, inbox: Inbox, *, now: float
) -> Iterator[NeedsAttention]:
    """Yield the files whose admission fails repeatedly. It is retried at growing intervals."""
    faults = Faults()  # `find_damage` reports the same
    for claim in inbox.claims(faults):
        with faults.of(claim.claim_id):
            states = _admissions(instance, claim, now=now)
            failed = [record for state, record in states if state is RunState.FAILED]
            if len(failed) >= MAX_FAILURES:
                latest = max(failed, key=lambda record: record.end_time or 0.0).dagster_run.run_id
                yield NeedsAttention(
                    batch_id=claim.file_name,
                    run_id=latest,
                    reason=(
                        f"its admission failed {len(failed)} times and is tried on, ever more"
                        f" rarely; mend the cause that the page of run {latest[:8]} shows"
                    ),
                )


@dg.sensor(
    jobs=[answer_chunks, deliver_batch],
    minimum_interval_seconds=INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Asks for the runs that each unfinished batch needs next: chunks first, then its output. "
        "Ends batches whose window is over, and those of which a person terminated a run. "
        "Failed runs are tried again with growing pauses. A skipped tick says which batches "
        "wait, and why; where a person is needed it says for what."
    ),
)
def dispatch_sensor(
    context: dg.SensorEvaluationContext, settings: SettingsResource
) -> dg.SensorResult | dg.SkipReason:
    """Decide from the store and from Dagster's runs, so that no crash matters."""
    now = time.time()
    store = open_store(settings, deadline_seconds=STORE_DEADLINE_SECONDS)
    folder, faults = data_folder(settings), Faults()
    try:
        keep_index(folder=folder, store=store, now=now)
        finish_resumptions(folder=folder, store=store, faults=faults)
        refusal = look_again(folder, settings, now=now)
        queue, problems = _keep_queue(context, settings, now=now, faults=faults)
        batches = _known_to_dagster(context.instance, store.unfinished(), folder, faults)
        runs = known_runs(context.instance, [batch.batch_id for batch in batches], now=now)
        runs, early_ends = end_due_batches(
            *(context.instance, batches, runs),
            folder=folder,
            store=store,
            now=now,
            doubt=clock_doubt(folder, most_seconds=EXPIRY_SECONDS),
            faults=faults,
        )
        # The other batches go on; these do by themselves as soon as their files are mended.
        batches = [batch for batch in batches if batch.batch_id not in faults]
        no_engine = _no_engine(settings, queue) if batches else None
        plan = dispatch(
            in_order_of_service(batches, queue),
            runs,
            reports=store.chunk_reports,
            chunks_per_run=settings.chunks_per_run,
            most_requests=settings.max_requests_per_batch,
            now=now,
            priorities=run_priorities(queue),
            no_engine=no_engine,
            refused_run=refusal.run_id if refusal and _is_refusal(no_engine) else None,
            early_ends=early_ends,
            halts=halts_in_force(folder, batches),
        )
    except (StoreLocked, StoreDamaged) as error:
        return dg.SkipReason(f"the store cannot be read now: {error}")
    except StorageError as error:
        return dg.SkipReason(f"no run is asked for now: {error}")
    with contextlib.suppress(StorageError):  # only readers of the file go without it
        admissions = _failing_admissions(context.instance, Inbox(folder, settings), now=now)
        write_needs_attention(folder, [*plan.needs, *map(_mend, faults), *admissions])
    idle = f"batches at work: {len(batches)}" if batches else "no unfinished batch"
    requests = [_request(context.instance, needed) for needed in plan.needed]
    waiting = [*problems, *map(str, faults), *plan.waiting]
    return _result(context, requests, waiting, idle=idle)


def _mend(fault: MemberFault) -> NeedsAttention:
    """Return the need for attention of a batch with an unreadable file."""
    return NeedsAttention(
        batch_id=fault.member,
        run_id="",
        reason=f"waits for a person: {fault.reason}. It goes on by itself once that is mended",
    )


def _keep_queue(
    context: dg.SensorEvaluationContext, settings: Settings, *, now: float, faults: Faults
) -> tuple[QueueView, list[str]]:
    """Return the queue and its problems.

    Batches must end in time and be delivered whatever the problem; their order is then by name.
    """
    folder = data_folder(settings)
    try:
        view, changed = refresh_queue(
            folder=folder,
            store=open_store(settings, deadline_seconds=STORE_DEADLINE_SECONDS),
            inbox=Inbox(folder, settings),
            settings=settings,
            now=now,
            faults=faults,
        )
        report_queue(context, view, changed, folder)
    except StoreLocked:
        raise
    except StorageError as error:
        view = QueueView(at=now, paused=read_pause(folder))
        return view, [f"the queue cannot be kept now: {error}"]
    return view, []


def _is_refusal(no_engine: str | None) -> bool:
    """Whether the engine itself refuses all runs, so that a person may have to act."""
    return no_engine is not None and no_engine.startswith(WaitReason.ENGINE_REFUSES_US)


def _no_engine(settings: Settings, queue: QueueView) -> str | None:
    """Return the reason why no engine can be started now; None if one can."""
    gate = closed_gate(queue.paused, settings)
    return None if gate is None else str(gate)


def _known_to_dagster(
    instance: dg.DagsterInstance,
    batches: Iterable[BatchRecord],
    folder: DataFolder,
    faults: Faults,
) -> list[BatchRecord]:
    """Return the batches that have their partitions, after recreating lost ones.

    Partitions are missing if an admission was killed between store and partitions, or if Dagster's
    own storage was wiped.
    """
    known: list[BatchRecord] = []
    unknown: list[BatchRecord] = []
    for batch in batches:
        (known if has_partitions(instance, batch.batch_id) else unknown).append(batch)
    live = dg.RunsFilter(job_name=admit_batch.name, statuses=LIVE_STATUSES)
    # The run that admits a file adds its partitions itself.
    if not unknown or instance.get_runs(live, limit=1):
        return known
    for batch in unknown:
        with faults.of(batch.batch_id):
            plan = folder.read_plan(batch.batch_id)
            estimate = read_estimate(folder, plan.batch_id)
            event = manifest_materialization(plan, folder.input_path(plan.batch_id), estimate)
            instance.report_runless_asset_event(event)
            add_partitions(instance, plan)
            known.append(batch)
    return known


def _request(instance: dg.DagsterInstance, needed: NeededRun) -> dg.RunRequest:
    batch_id, key = needed.batch.batch_id, free_run_key(instance, needed.key)
    tags = batch_tags(needed.batch, priority=needed.priority)
    if needed.chunks is None:
        return dg.RunRequest(key, job_name=deliver_batch.name, partition_key=batch_id, tags=tags)
    tags |= range_tags(batch_id, needed.chunks)
    return dg.RunRequest(key, job_name=answer_chunks.name, tags=tags)


def _result(
    context: dg.SensorEvaluationContext,
    requests: Sequence[dg.RunRequest],
    reasons: Sequence[str],
    *,
    idle: str,
) -> dg.SensorResult | dg.SkipReason:
    """Return the run requests and log them with the reasons; without requests, skip with these."""
    shown = [*reasons[:SHOWN_REASONS]]
    if len(reasons) > SHOWN_REASONS:
        shown.append(f"and {len(reasons) - SHOWN_REASONS} more")
    if not requests:
        return dg.SkipReason("; ".join(shown) or idle)
    for request in requests:
        context.log.info(f"asks for {request.job_name or admit_batch.name}: {request.run_key}")
    for reason in shown:
        context.log.info(f"waits: {reason}")
    return dg.SensorResult(run_requests=list(requests))
