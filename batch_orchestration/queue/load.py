"""The load of this deployment: the work queued now, and whether one more batch fits beside it."""

import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.estimates.batch_estimates import read_estimate_in
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.health import gpu_problem
from batch_orchestration.queue.capacity import Blocker, Load, check_capacity, rate_blocker
from batch_orchestration.queue.demand import Demand, Limits, rough_tokens
from batch_orchestration.queue.entries import Pause, WaitReason
from batch_orchestration.queue.halts import halts_in_force
from batch_orchestration.queue.pause import pause_blocker, read_pause
from batch_orchestration.queue.rate_limits import (
    SECONDS_PER_HOUR,
    Rate,
    SourceRates,
    SubmissionEvent,
)
from batch_orchestration.queue.refused_engine import refusal_in_words
from batch_orchestration.settings import Settings
from batch_orchestration.store.store import Store


def queue_limits(settings: Settings) -> Limits:
    """Return the limits on the queue."""
    return Limits(
        unfinished_batches=settings.max_unfinished_batches,
        queued_requests=settings.max_queued_requests,
        queued_tokens=settings.max_queued_tokens,
        disk_reserve_bytes=settings.disk_reserve_bytes,
        output_bytes_ratio=settings.output_bytes_ratio,
        open_requests=settings.max_requests_per_batch,
    )


def read_rates(store: Store, settings: Settings, *, now: float) -> SourceRates:
    """Return the rate limits and the submissions of all sources that still count towards them.

    They are derived from the stored batches, so no counter can get out of step. Files that wait in
    the inbox do not count as submitted.

    Raises:
        StorageError: The store cannot be read.
    """
    per_hour = settings.source_requests_per_hour
    rates = SourceRates(
        submissions=Rate(
            per_hour=settings.source_submissions_per_hour, burst=settings.source_submissions_burst
        ),
        requests=Rate(per_hour=per_hour, burst=settings.source_requests_burst),
    )
    if not store.exists:
        return rates
    submitted = store.submitted(
        since=max(0.0, now - rates.memory_seconds),
        requests_per_second=per_hour / SECONDS_PER_HOUR,
        now=now,
    )
    events = (
        SubmissionEvent(record.source, record.times[BatchStatus.VALIDATING], record.total)
        for record in submitted
    )
    return replace(rates, events=tuple(events))


def check_file_capacity(
    plan: BatchPlan,
    demand: Demand,
    *,
    folder: DataFolder,
    store: Store,
    settings: Settings,
    now: float,
) -> Blocker | None:
    """Return the blocker of a file that was just read; None if it may be admitted now.

    Call it under `admission_lock`, so that two files cannot both take the last capacity.

    Raises:
        StorageError: The store cannot be read.
    """
    if (paused := read_pause(folder)) is not None:
        return pause_blocker(paused)
    rates = read_rates(store, settings, now=now)
    blocker = rate_blocker(rates, plan.source, plan.requests, now=now)
    if blocker is not None:
        return blocker
    limits = queue_limits(settings)
    return check_capacity(demand, read_load(folder, store.unfinished(), limits=limits), limits)


def never_fits(demand: Demand, settings: Settings) -> str | None:
    """Return why a file exceeds the token limit even of an empty queue; None if it does not."""
    tokens = demand.open_at_once(queue_limits(settings)).tokens or 0
    if tokens <= settings.max_queued_tokens:
        return None
    return (
        f"its {tokens:,} expected tokens at a time are more than the"
        f" {settings.max_queued_tokens:,} that may be queued (BATCH_MAX_QUEUED_TOKENS)"
    )


def closed_gate(paused: Pause | None, settings: Settings) -> Blocker | None:
    """Return the blocker of all entries: a pause, an unfit device or an engine that refuses us.

    Args:
        paused: The pause in force; while there is one, neither device nor engine is examined.

    Returns:
        None if no entry has to wait.
    """
    if paused is not None:
        return pause_blocker(paused)
    if (problem := gpu_problem(settings)) is not None:
        return Blocker(WaitReason.GPU_UNHEALTHY, problem)
    refusal = refusal_in_words(settings)
    return None if refusal is None else Blocker(WaitReason.ENGINE_REFUSES_US, refusal)


def demand_of(plan: BatchPlan, batch_folder: Path) -> Demand:
    """Return the capacity that a batch needs.

    Args:
        batch_folder: Folder of the estimate; without one, tokens are derived from the input's size.
    """
    estimate = read_estimate_in(batch_folder)
    rough = rough_tokens(plan.requests, plan.size_bytes)
    return Demand(
        requests=plan.requests,
        tokens=rough if estimate is None else estimate.tokens,
        size_bytes=plan.size_bytes,
    )


def demand_in(folder: DataFolder, plan: BatchPlan) -> Demand:
    """Return the capacity that an admitted batch needed at admission."""
    return demand_of(plan, folder.plan_path(plan.batch_id).parent)


def left_of(demand: Demand, record: BatchRecord) -> Demand:
    """Return the part of a batch's demand that its uncommitted requests still need."""
    share = record.pending / max(record.total, 1)
    return Demand(
        requests=record.pending,
        tokens=round((demand.tokens or 0) * share),
        size_bytes=round(demand.size_bytes * share),
    )


def read_load(
    folder: DataFolder,
    records: Collection[BatchRecord],
    *,
    limits: Limits,
    faults: Faults | None = None,
) -> Load:
    """Return the load: the remaining work of each unfinished batch, and the free disk space.

    A paused batch takes no capacity from others, as it may wait for a person for days.

    Args:
        records: The unfinished batches.
        faults: Collects batches whose plan cannot be read. They wait for a person, do no work and
            take no capacity from others.
    """
    faults = faults or Faults()
    load = Load(free_bytes=shutil.disk_usage(folder.root).free)
    halts = halts_in_force(folder, records)
    for record in records:
        if record.batch_id in halts:
            continue
        with faults.of(record.batch_id):
            left = left_of(demand_in(folder, folder.read_plan(record.batch_id)), record)
            load = load.plus(left, limits)
    return load
