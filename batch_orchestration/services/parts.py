"""Parts of submissions: those that wait, and their admission as room appears.

A waiting part lies ready in its submission's folder, and one rename makes it a batch. So a crash
at any point leaves it waiting, or a batch that the store has yet to be told of.
"""

import contextlib
from collections.abc import Callable, Iterable

import filelock

from batch_orchestration.domain.batches import BatchPlan
from batch_orchestration.domain.errors import BatchNotFound, FileDamaged, StorageError, StoreLocked
from batch_orchestration.domain.lifecycle import Closing
from batch_orchestration.domain.members import Faults
from batch_orchestration.domain.room import Obstacle
from batch_orchestration.services.crash_points import CrashPoint, crash_point
from batch_orchestration.services.estimates import record_estimate
from batch_orchestration.services.registration import (
    admission_lock,
    register_batch,
    register_unlisted,
    unlisted,
)
from batch_orchestration.storage.files import DataFolder, sync_folder
from batch_orchestration.storage.store import Store
from batch_orchestration.storage.unfinished import waiting_part_ids

#: Of a tick's 60 s; who admits a file holds the lock for as long as it takes to write its plan.
_LOCK_TIMEOUT_SECONDS = 10.0


def waiting_parts(folder: DataFolder, faults: Faults | None = None) -> list[BatchPlan]:
    """Return the parts that are not admitted yet: by priority, then by age, in file order.

    Args:
        folder: The data folder.
        faults: Takes those whose plan cannot be read, by their id.
    """
    found, faults = [], Faults() if faults is None else faults
    for part_id in waiting_part_ids(folder):
        with faults.of(part_id):
            if (plan := folder.read_waiting_part(part_id)) is not None:
                found.append((_turn(plan, folder), plan))
    return [plan for _, plan in sorted(found, key=lambda pair: pair[0])]


def _turn(plan: BatchPlan, folder: DataFolder) -> tuple[int, float, str, int]:
    if plan.part is None:
        raise FileDamaged(folder.waiting_part_path(plan.batch_id) / "plan.json", "is of no part")
    return (-plan.options.priority, plan.created_at, plan.part.submission, plan.part.number)


def admit_part(
    part_id: str,
    *,
    folder: DataFolder,
    store: Store,
    at: float,
    obstacle_to: Callable[[BatchPlan], Obstacle | None] = lambda plan: None,
) -> BatchPlan | None:
    """Make a waiting part a batch, and return its plan; one that is a batch already stays so.

    None if there is no room for it after all.

    Raises:
        BatchNotFound: There is no such part.
        TimeoutError: A file is being admitted, and goes on for long.
    """
    with admission_lock(folder).acquire(timeout=_LOCK_TIMEOUT_SECONDS):
        plan = folder.read_waiting_part(part_id)
        if plan is not None and obstacle_to(plan) is not None:
            return None
        _make_batch(part_id, folder)
        register_batch(folder, store, part_id, at=at)
    record_estimate(folder, store, part_id)
    return folder.read_plan(part_id)


def admit_closed(
    part_ids: Iterable[str], closing: Closing, *, folder: DataFolder, store: Store, at: float
) -> list[str]:
    """Make those that wait batches which have ended before they began; return their ids.

    The decision lies in the part's folder before that is renamed, so that no run ever starts. If
    the store is locked, the next tick tells it of them.

    Raises:
        StorageError: A file is being admitted, and goes on for long; do it again.
    """
    closed: list[str] = []
    try:
        with admission_lock(folder).acquire(timeout=_LOCK_TIMEOUT_SECONDS):
            for part_id in part_ids:
                # The plan is not needed for that, and may be damaged.
                if folder.waiting_part_path(part_id).exists():
                    folder.close_waiting_part(part_id, closing)
                    crash_point(CrashPoint.AFTER_CLOSING)
                    _make_batch(part_id, folder)
                    closed.append(part_id)
            with contextlib.suppress(StoreLocked):
                register_unlisted(folder, store, at=at)
    except filelock.Timeout as busy:
        raise StorageError("a file is being admitted just now; do it again in a moment") from busy
    return closed


def _make_batch(part_id: str, folder: DataFolder) -> None:
    """Rename the folder of a waiting part to that of a batch, durably; call it under the lock."""
    waiting, target = folder.waiting_part_path(part_id), folder.plan_path(part_id).parent
    folder.mark_unfinished(part_id)
    with contextlib.suppress(FileNotFoundError):  # admitted before
        waiting.rename(target)
        sync_folder(folder.batches)
        sync_folder(waiting.parent)


def admit_parts(
    part_ids: Iterable[str],
    *,
    folder: DataFolder,
    store: Store,
    obstacle_to: Callable[[BatchPlan], Obstacle | None],
    at: float,
    faults: Faults | None = None,
) -> list[BatchPlan]:
    """Admit waiting parts up to the first for which there is no room; return them.

    Args:
        part_ids: In the order of service.
        folder: The data folder.
        store: The store.
        obstacle_to: Decides, while nobody else can be admitted, whether there is room for one more.
        at: POSIX seconds.
        faults: Takes the parts that cannot be admitted for a reason of their own.

    Raises:
        StorageError: The store cannot be asked or told.
    """
    admitted: list[BatchPlan] = []
    faults = Faults() if faults is None else faults
    for part_id in part_ids:
        with faults.of(part_id):
            try:
                plan = admit_part(
                    part_id, folder=folder, store=store, at=at, obstacle_to=obstacle_to
                )
            except filelock.Timeout:  # the next tick comes soon
                break
            if plan is None:
                break
            admitted.append(plan)
        if part_id in faults and folder.plan_path(part_id).exists():
            break  # it takes room of which the store does not know yet
    return admitted


def register_lost(
    folder: DataFolder, store: Store, *, at: float, faults: Faults | None = None
) -> None:
    """Tell the store of batches that a crash kept from it, parts or not.

    Raises:
        StorageError: The store cannot be asked or told.
    """
    with contextlib.suppress(filelock.Timeout):  # the next tick comes soon
        if unlisted(folder, store):
            with admission_lock(folder).acquire(timeout=_LOCK_TIMEOUT_SECONDS):
                register_unlisted(folder, store, at=at, faults=faults)


def plan_of(batch_id: str, *, folder: DataFolder) -> BatchPlan:
    """Return the plan of a batch, also of a part that waits to be one.

    Raises:
        BatchNotFound: There is neither.
    """
    try:
        return folder.read_plan(batch_id)
    except BatchNotFound:
        if (waiting := folder.read_waiting_part(batch_id)) is not None:
            return waiting
        raise
