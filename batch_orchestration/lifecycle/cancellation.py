"""Early ends: the decision to cancel or expire a batch, and its immediate effects.

The decision is a file (`early-end.json` beside the plan) before the store is updated. It therefore
needs no unlocked store, survives any kill, and reaches a run that works on the batch within a
second. The first decision stands. `lifecycle.close_out` then completes the batch.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import (
    BatchNotFound,
    FileDamaged,
    IllegalTransition,
    Shortage,
    StoreLocked,
)
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import EarlyEnd, Resumption, deadline
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.atomic import disk_errors, shortages
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.sharing import shared_lock
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.files.unfinished import mark
from batch_orchestration.lifecycle.clock import EXPIRY_SECONDS, clock_doubt
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Cancellation:
    """A decision to cancel.

    Attributes:
        earlier: Whether it was made before this call.
        over: Whether the batch already has the status `cancelled`.
    """

    early_end: EarlyEnd
    earlier: bool
    over: bool


def early_end_lock(folder: DataFolder, batch_id: str) -> BaseFileLock:
    """Return the lock for decisions about the end of a batch; it is never held for long."""
    return shared_lock(folder.early_end(batch_id).path.with_name("early-end.lock"))


def early_end_in_force(folder: DataFolder, record: BatchRecord) -> EarlyEnd | None:
    """Return the decision by which a batch ends, or has ended, early; None if there is none.

    A cancellation made after delivery began is ignored.
    """
    early_end = folder.early_end(record.batch_id).read()
    if early_end is None or record.status is BatchStatus.COMPLETED:
        return None
    late = record.status is BatchStatus.FINALIZING and early_end.status is BatchStatus.CANCELLED
    return None if late else early_end


def cancel(
    batch_id: str, *, folder: DataFolder, store: Store, actor: str, reason: str, at: float
) -> Cancellation:
    """Decide that a batch is cancelled. Idempotent.

    If the store is locked, the decision still stands and the status follows later. No readable plan
    is needed, and decisions that cannot be read are replaced.

    Args:
        actor: Run or person.

    Raises:
        BatchNotFound: There is no such batch.
        IllegalTransition: There is nothing left to cancel; the message has the reason.
        StoreLocked: The store is locked, and the batch may have ended already.
    """
    require_batch(batch_id, folder)
    with early_end_lock(folder, batch_id):
        set_damaged_decisions_aside(batch_id, folder, at=at)
        known = folder.early_end(batch_id).read()
        record = _record(batch_id, folder, store)
        if record and (cause := _nothing_to_cancel(record, known)) is not None:
            raise IllegalTransition(f"there is nothing to cancel: batch {batch_id} {cause}")
        cancelled = EarlyEnd(status=BatchStatus.CANCELLED, at=at, actor=actor, reason=reason)
        early_end = known or _decide(batch_id, cancelled, folder)
        if record:
            _set_cancelling(record, early_end, store)
    over = record is not None and record.status is BatchStatus.CANCELLED
    return Cancellation(early_end=early_end, earlier=known is not None, over=over)


def _decide(batch_id: str, early_end: EarlyEnd, folder: DataFolder) -> EarlyEnd:
    folder.early_end(batch_id).write(early_end)
    crash_point(CrashPoint.AFTER_EARLY_END)
    return early_end


def require_batch(batch_id: str, folder: DataFolder) -> None:
    """Raise `BatchNotFound` unless there is a batch of this id; its plan may be damaged."""
    if not os.path.lexists(folder.plan_path(batch_id)):
        folder.read_plan(batch_id)


def set_damaged_decisions_aside(batch_id: str, folder: DataFolder, *, at: float) -> None:
    """Rename unreadable decisions about a batch, and keep them for inspection.

    Call it under `early_end_lock`, before a new decision of a person. A damaged resumption is
    replaced by one that keeps its time.

    Raises:
        StorageError: A decision cannot be renamed.
    """
    try:
        folder.early_end(batch_id).read()
    except FileDamaged as damaged:
        _set_aside(damaged.path, at)
    try:
        folder.resumption(batch_id).read()
    except FileDamaged as damaged:
        resumed_at = damaged.path.lstat().st_mtime
        _set_aside(damaged.path, at)
        resumption = Resumption(at=resumed_at, actor="unknown", reason=damaged.reason)
        mark(folder, batch_id)
        folder.resumption(batch_id).write(resumption)


def _set_aside(path: Path, at: float) -> None:
    with disk_errors(path):
        path.rename(path.with_name(f"{path.name}.damaged-{at:.0f}"))


def expire(
    batch: BatchPlan | BatchRecord, *, folder: DataFolder, actor: str, now: float
) -> EarlyEnd | None:
    """Decide that a batch has expired, if its window is over and it is not delivered.

    Args:
        actor: The run or sensor that checks the window.

    Returns:
        The decision in force, which may be an earlier one; None if there is none.
    """
    batch_id = batch.batch_id
    with early_end_lock(folder, batch_id):
        known = folder.early_end(batch_id).read()
        ends_at = deadline(batch, folder.resumption(batch_id).read())
        if known is not None or now < ends_at or delivered(folder, batch_id):
            return known
        reason = f"its completion window of {batch.options.completion_window} is over"
        if ends_at > deadline(batch):
            reason = "the completion window that it was resumed with is over"
        expired = EarlyEnd(status=BatchStatus.EXPIRED, at=now, actor=actor, reason=reason)
        return _decide(batch_id, expired, folder)


def end_overdue(
    batches: Iterable[BatchRecord],
    *,
    folder: DataFolder,
    store: Store,
    terminated: Mapping[str, str],
    actor: str,
    now: float,
    doubt: str | None = None,
    faults: Faults | None = None,
) -> dict[str, EarlyEnd]:
    """Decide which of the unfinished batches end early; return their decisions by batch id.

    This also completes decisions that a kill interrupted.

    Args:
        batches: Unfinished batches.
        terminated: By batch id, the run that a person terminated since the last resumption.
        actor: The sensor that checks the deadlines.
        doubt: Why the clock is not trusted, in which case no batch expires; None if it is.
        faults: Collects batches whose decision cannot be read or made.
    """
    early_ends: dict[str, EarlyEnd] = {}
    faults = faults or Faults()
    for batch in batches:
        batch_id = batch.batch_id
        with faults.of(batch_id):
            early_end = early_end_in_force(folder, batch)
            if early_end is None and batch.status is BatchStatus.CANCELLING:
                early_end = _decide_again(batch_id, folder=folder, store=store, actor=actor, at=now)
            elif early_end is None and _can_end_early(batch):
                if (run_id := terminated.get(batch_id)) is not None:
                    reason = "a person terminated this run"
                    early_end = cancel(
                        batch_id, folder=folder, store=store, actor=run_id, reason=reason, at=now
                    ).early_end
                elif now < deadline(batch, folder.resumption(batch_id).read()):
                    continue
                elif doubt is not None:
                    logger.warning("%s appears overdue and continues: %s", batch_id, doubt)
                else:
                    early_end = expire(batch, folder=folder, actor=actor, now=now)
            if early_end is not None:
                with early_end_lock(folder, batch_id):
                    _set_cancelling(store.batch(batch_id), early_end, store)
                early_ends[batch_id] = early_end
    return early_ends


def _decide_again(
    batch_id: str, *, folder: DataFolder, store: Store, actor: str, at: float
) -> EarlyEnd | None:
    """Renew a decision whose file was removed; None if the batch is not being cancelled now."""
    with early_end_lock(folder, batch_id):
        known = folder.early_end(batch_id).read()
        if known is not None or store.batch(batch_id).status is not BatchStatus.CANCELLING:
            return known
        reason = "unknown: early-end.json was removed while the batch was being cancelled"
        cancelled = EarlyEnd(status=BatchStatus.CANCELLED, at=at, actor=actor, reason=reason)
        return _decide(batch_id, cancelled, folder)


def delivered(folder: DataFolder, batch_id: str) -> bool:
    """Whether the output files of a batch exist and are newer than its last resumption."""
    try:
        written_at = (folder.outbox_path(batch_id) / "output.jsonl").stat().st_mtime
    except FileNotFoundError:
        return False
    resumption = folder.resumption(batch_id).read()
    return resumption is None or written_at > resumption.at


def _can_end_early(batch: BatchRecord) -> bool:
    return batch.status is BatchStatus.IN_PROGRESS and batch.chunks_committed < batch.chunks


def _record(batch_id: str, folder: DataFolder, store: Store) -> BatchRecord | None:
    """Return the record of a batch; None if there is none yet, or if the store is locked.

    Raises:
        StoreLocked: The store is locked, and output files exist: the batch may have ended.
    """
    try:
        return store.batch(batch_id)
    except BatchNotFound:
        # Admission writes the plan first and the record right after.
        return None
    except StoreLocked:
        if delivered(folder, batch_id):
            raise
        return None


def _nothing_to_cancel(record: BatchRecord, known: EarlyEnd | None) -> str | None:
    """Return why a batch cannot be cancelled; None if it can be, or has been."""
    status = record.status
    if status in (BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.FAILED):
        return f"is {status}"
    if known is not None and known.status is BatchStatus.EXPIRED:
        return "has expired, and its answers are being delivered"
    if status is BatchStatus.CANCELLED and known is None:
        return "is being resumed; try again in a moment"
    # A batch in `cancelling` without a decision lost it, because the file was damaged.
    if known is None and status is not BatchStatus.CANCELLING and not _can_end_early(record):
        return "has an outcome for every request, and its files are being written"
    return None


def _set_cancelling(record: BatchRecord, early_end: EarlyEnd, store: Store) -> None:
    """Set the status for a cancellation; the status of an expired batch changes at its end."""
    if (
        early_end.status is not BatchStatus.CANCELLED
        or record.status is not BatchStatus.IN_PROGRESS
    ):
        return
    # If the store is locked, the next tick of the sensor sets the status, and so does close-out.
    with contextlib.suppress(StoreLocked):
        store.set_status(
            record.batch_id,
            BatchStatus.CANCELLING,
            at=early_end.at,
            actor=early_end.actor,
            reason=early_end.reason,
        )


#: Interval of the checks for a decision; a person who cancels should see the effect.
CHECK_SECONDS = 1.0
#: Between two requests to stop; one that coincides with the engine's death may be missed.
ABORT_SECONDS = 1.0
#: For commits of complete chunks after a decision; a locked store must not delay the run's end.
COMMIT_SECONDS = 4.0


class EarlyEndWatch:
    """Watches for the early end of a batch: a person's decision, or its deadline.

    Args:
        run_id: The run that watches; after the deadline it expires the batch, unless that is done.
        only_new: Whether the deadline and earlier decisions are ignored.

    Attributes:
        deadline: End of the batch's window; infinite with `only_new`.
    """

    def __init__(
        self, plan: BatchPlan, folder: DataFolder, *, run_id: str, only_new: bool = False
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._run_id = run_id
        self._earlier = folder.early_end(plan.batch_id).read() if only_new else None
        resumption = folder.resumption(plan.batch_id).read()
        self.deadline = float("inf") if only_new else deadline(plan, resumption)
        self._found: EarlyEnd | None = None
        self._found_at = 0.0
        self._warned_of_damage = self._warned_of_doubt = False

    @property
    def impatient(self) -> bool:
        """Whether the time for commits is over; close-out then handles the uncommitted chunks."""
        return self._found is not None and time.monotonic() - self._found_at > COMMIT_SECONDS

    async def until_early_end(self, work: Coroutine[Any, Any, None]) -> None:
        """Await the work; as soon as the batch ends early, abort it and return.

        Exceptions of the work itself are raised.
        """
        if self._ends_early():
            work.close()
            return
        working = asyncio.ensure_future(work)
        try:
            while not working.done():
                await asyncio.wait({working}, timeout=CHECK_SECONDS)
                if not working.done() and self._ends_early():
                    await _abort(working)
                    return
        except asyncio.CancelledError:
            # The run itself is being stopped.
            await _abort(working)
            raise
        await working

    def _ends_early(self) -> bool:
        early_end_file = self._folder.early_end(self._plan.batch_id)
        # A shortage leaves the check to the next call.
        with contextlib.suppress(Shortage), shortages(early_end_file.path):
            if self._found is None and (found := self._decision(early_end_file)) is not None:
                self._found, self._found_at = found, time.monotonic()
                logger.warning(
                    "%s ends early, %s; requests in flight are dropped", self._plan.batch_id, found
                )
        return self._found is not None

    def _decision(self, early_end_file: StateFile[EarlyEnd]) -> EarlyEnd | None:
        """Return the decision to end the batch early, and make it if the deadline is over."""
        try:
            found = early_end_file.read()
        except FileDamaged as damaged:
            # This run continues, but no other is started.
            if not self._warned_of_damage:
                logger.warning("%s; this run continues", damaged)
            self._warned_of_damage, found = True, None
        if found is not None and found != self._earlier:
            return found
        now = time.time()
        if now >= self.deadline and self._clock_is_trusted():
            return expire(self._plan, folder=self._folder, actor=self._run_id, now=now)
        return None

    def _clock_is_trusted(self) -> bool:
        doubt = clock_doubt(self._folder, most_seconds=EXPIRY_SECONDS)
        if doubt is not None and not self._warned_of_doubt:
            self._warned_of_doubt = True
            logger.warning("%s appears overdue and continues: %s", self._plan.batch_id, doubt)
        return doubt is None


async def _abort(working: asyncio.Future[None]) -> None:
    while not working.done():
        working.cancel()
        await asyncio.wait({working}, timeout=ABORT_SECONDS)
    if not working.cancelled() and (error := working.exception()) is not None:
        logger.warning("while it was stopped: %s", error)
