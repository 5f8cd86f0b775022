"""The load of this deployment: the work queued now, and whether one more batch fits beside it."""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.estimates.batch_estimates import read_estimate_in
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.health import gpu_problem
from batch_orchestration.queue.capacity import (
    Blocker,
    Demand,
    Limits,
    Load,
    check_capacity,
    rate_blocker,
    rough_tokens,
)
from batch_orchestration.queue.entries import Pause, WaitReason
from batch_orchestration.queue.files import read_pause
from batch_orchestration.queue.halts import halts_in_force
from batch_orchestration.queue.ordering import OrderPolicy
from batch_orchestration.queue.rate_limits import Rate, RateLimits
from batch_orchestration.queue.refused_engine import refusal_in_words
from batch_orchestration.queue.submitted import read_rates
from batch_orchestration.settings import Settings
from batch_orchestration.store.store import Store


@dataclass(frozen=True, kw_only=True)
class QueueRules:
    """The settings that the queue depends on.

    Attributes:
        ordering: Policy of the order of service.
        device_problem: Returns the problem of the device; None if it is fit for work.
        engine_refusal: Returns the refusal of the engine; None if none is known.
    """

    limits: Limits = field(default_factory=Limits)
    rates: RateLimits = field(default_factory=RateLimits)
    ordering: OrderPolicy = field(default_factory=OrderPolicy)
    device_problem: Callable[[], str | None] = lambda: None
    engine_refusal: Callable[[], str | None] = lambda: None


def check_file_capacity(
    plan: BatchPlan,
    demand: Demand,
    *,
    folder: DataFolder,
    store: Store,
    rules: QueueRules,
    now: float,
) -> Blocker | None:
    """Return the blocker of a file that was just read; None if it may be admitted now.

    Call it under `admission_lock`, so that two files cannot both take the last capacity.

    Raises:
        StorageError: The store cannot be read.
    """
    if (paused := read_pause(folder)) is not None:
        return pause_blocker(paused)
    rates = read_rates(folder, store, limits=rules.rates, now=now)
    blocker = rate_blocker(rates, plan.source, plan.requests, now=now)
    if blocker is not None:
        return blocker
    load = read_load(folder, store.unfinished(), limits=rules.limits)
    return check_capacity(demand, load, rules.limits)


def never_fits(demand: Demand, *, rules: QueueRules) -> str | None:
    """Return why a file exceeds the token limit even of an empty queue; None if it does not."""
    tokens = demand.open_at_once(rules.limits).tokens or 0
    limit = rules.limits.queued_tokens
    if tokens <= limit:
        return None
    return (
        f"its {tokens:,} expected tokens at a time are more than the {limit:,} that may be queued"
        " (BATCH_MAX_QUEUED_TOKENS)"
    )


def closed_gate(
    paused: Pause | None,
    device_problem: Callable[[], str | None],
    engine_refusal: Callable[[], str | None],
) -> Blocker | None:
    """Return the blocker of all entries: a pause, an unfit device or an engine that refuses us.

    Args:
        paused: The pause in force.
        device_problem: Called only if there is no pause.
        engine_refusal: Called only if the device is fit for work, too.

    Returns:
        None if no entry has to wait.
    """
    if paused is not None:
        return pause_blocker(paused)
    problem = device_problem()
    if problem is not None:
        return Blocker(WaitReason.GPU_UNHEALTHY, problem)
    refusal = engine_refusal()
    return None if refusal is None else Blocker(WaitReason.ENGINE_REFUSES_US, refusal)


def pause_blocker(paused: Pause) -> Blocker:
    """Return the blocker of all entries while the queue is paused."""
    why = f": {paused.reason}" if paused.reason else ""
    return Blocker(WaitReason.PAUSED, f"{paused.actor} paused the queue{why}")


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


def queue_rules(settings: Settings) -> QueueRules:
    """Return the settings that the queue depends on."""
    return QueueRules(
        limits=Limits(
            unfinished_batches=settings.max_unfinished_batches,
            queued_requests=settings.max_queued_requests,
            queued_tokens=settings.max_queued_tokens,
            disk_reserve_bytes=settings.disk_reserve_bytes,
            output_bytes_ratio=settings.output_bytes_ratio,
            open_requests=settings.max_requests_per_batch,
        ),
        rates=RateLimits(
            submissions=Rate(
                per_hour=settings.source_submissions_per_hour,
                burst=settings.source_submissions_burst,
            ),
            requests=Rate(
                per_hour=settings.source_requests_per_hour,
                burst=settings.source_requests_burst,
            ),
        ),
        ordering=OrderPolicy(ageing_seconds=settings.priority_ageing_seconds),
        device_problem=partial(gpu_problem, settings),
        engine_refusal=partial(refusal_in_words, settings),
    )
