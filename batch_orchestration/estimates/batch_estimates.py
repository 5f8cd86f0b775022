"""Makes estimates at admission, and stores them beside the plan and in the store.

`estimate.json` is written with the plan. `expected_seconds` reads that file, so the queue can call
it at each tick without a query of the store.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from batch_orchestration.core.batches import BatchOptions, BatchPlan, BatchStatus
from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.lifecycle import window_seconds
from batch_orchestration.estimates.costs import Throughput, throughput
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration.estimates.estimate import Band, Estimate, TokenHistory, estimate
from batch_orchestration.estimates.profile import TokenProfile
from batch_orchestration.estimates.tables import CachedEngineInfo, EstimateTables
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.store.store import Store

_T = TypeVar("_T")
logger = logging.getLogger(__name__)
PROFILE, ESTIMATE = "profile.json", "estimate.json"
_UNFINISHED = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """The engine in force, with its stored history and measurements; empty for a new one."""

    engine: EngineInForce = field(default_factory=EngineInForce)
    history: TokenHistory = field(default_factory=TokenHistory)
    throughput: Throughput | None = None
    facts: CachedEngineInfo | None = None


def read_calibration_data(tables: EstimateTables, engine: EngineInForce) -> CalibrationData:
    """Return the calibration data of an engine and its model; empty if there is no store."""
    if not tables.exist:
        return CalibrationData(engine=engine)
    return CalibrationData(
        engine=engine,
        history=TokenHistory(tables.answered(engine.model)),
        throughput=throughput(tables.measurements(engine)),
        facts=tables.engine_info(engine),
    )


def estimate_profile(
    profile: TokenProfile,
    options: BatchOptions,
    *,
    calibration_data: CalibrationData,
    price_per_gpu_hour: float | None = None,
    ahead_seconds: float = 0.0,
    at: float,
    seed: str = "",
) -> Estimate:
    """Return the estimate of a batch with this profile.

    Args:
        ahead_seconds: Time until the batches ahead of it are done.
        seed: Seed of the draws, for example the file's hash.
    """
    found = estimate(
        profile,
        history=calibration_data.history,
        throughput=calibration_data.throughput,
        at_a_time=calibration_data.engine.at_a_time,
        seed=seed,
    )
    facts = calibration_data.facts
    return msgspec.structs.replace(
        found,
        start_seconds=None if facts is None else facts.start_seconds,
        ahead_seconds=round(ahead_seconds, 3),
        window_seconds=float(window_seconds(options.completion_window)),
        engine=calibration_data.engine.key,
        price=None
        if price_per_gpu_hour is None or found.seconds is None
        else found.seconds.scaled(price_per_gpu_hour / 3600),
        created_at=at,
    )


def write_estimate(batch_folder: Path, profile: TokenProfile, estimate: Estimate) -> None:
    """Write profile and estimate to the folder that is, or will be, the batch's.

    The files are not fsynced: their loss only makes later estimates less accurate.
    """
    (batch_folder / PROFILE).write_bytes(msgspec.json.encode(profile) + b"\n")
    (batch_folder / ESTIMATE).write_bytes(msgspec.json.encode(estimate) + b"\n")


def read_profile(folder: DataFolder, batch_id: str) -> TokenProfile | None:
    """Return the profile of a batch; None if it is missing or unreadable."""
    return _read(folder.plan_path(batch_id).with_name(PROFILE), TokenProfile)


def read_estimate(folder: DataFolder, batch_id: str) -> Estimate | None:
    """Return the estimate made at a batch's admission; None if it is missing or unreadable."""
    return read_estimate_in(folder.plan_path(batch_id).parent)


def record_estimate(folder: DataFolder, store: Store, batch_id: str) -> None:
    """Store the batch's estimate. Idempotent."""
    if (estimate := read_estimate(folder, batch_id)) is not None:
        EstimateTables(store).add_estimate(batch_id, estimate)


def expected_seconds(
    plan: BatchPlan, *, folder: DataFolder, pending: int | None = None
) -> Band | None:
    """Return the time for which a batch will keep the engine busy; None if not estimated.

    Args:
        pending: Scale to this number of requests; all of them by default.
    """
    estimate = read_estimate(folder, plan.batch_id)
    if estimate is None or estimate.seconds is None:
        return None
    if pending is None or not plan.requests:
        return estimate.seconds
    return estimate.seconds.scaled(pending / plan.requests)


def expected_ahead(folder: DataFolder, store: Store, *, priority: int) -> float:
    """Return the expected seconds of unfinished batches with this or a higher priority."""
    seconds = 0.0
    for record in store.unfinished():
        if record.status not in _UNFINISHED or record.options.priority < priority:
            continue
        estimate = read_estimate(folder, record.batch_id)
        if estimate is not None and estimate.seconds is not None:
            seconds += estimate.seconds.mid * record.pending / record.total
    return seconds


def read_estimate_in(batch_folder: Path) -> Estimate | None:
    """Return the estimate in a folder that is, or will be, a batch's; None if unreadable."""
    return _read(batch_folder / ESTIMATE, Estimate)


def _read(path: Path, kind: type[_T]) -> _T | None:
    try:
        return StateFile(path, kind).read()
    except StorageError as error:
        logger.warning("estimating without a file: %s", error)
        return None
