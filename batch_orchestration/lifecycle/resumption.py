"""Resuming a batch that was paused or cancelled, or has expired: only unanswered requests are sent.

The decision is a file (`resumed.json` beside the plan, which itself never changes) before the store
is updated. The failures of an early end are not in the journals, so resuming only takes back the
commits of the chunks that hold such failures. The next runs find all other outcomes in the
journals, and their commits resolve the dead letters.
"""

import logging

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import IllegalTransition, StoreLocked
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import (
    RESUMABLE,
    UNASKED_CODES,
    Resumption,
    deadline,
    window_seconds,
)
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.unfinished import mark, marked
from batch_orchestration.lifecycle.cancellation import early_end_lock, set_damaged_decisions_aside
from batch_orchestration.queue.halts import halt_in_force
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)


def resume(
    batch_id: str,
    *,
    folder: DataFolder,
    store: Store,
    actor: str,
    reason: str = "",
    completion_window: str | None = None,
    max_failure_rate: float | None = None,
    at: float,
) -> Resumption:
    """Decide that a batch is resumed, and set it back to `in_progress`.

    Outcomes before `at` do not count in the failure rate any more.

    Args:
        actor: Run or person.
        completion_window: A new window, counted from `at`; required if the present one is over.
        max_failure_rate: A new limit, 0 to 1.

    Raises:
        BatchNotFound: There is no such batch.
        IllegalTransition: The batch is not paused and has not ended early, or its window is over.
        ValueError: The window is not a duration, or the limit not between 0 and 1.
        StoreLocked: The store is locked, and nothing was decided.
    """
    folder.read_plan(batch_id)
    if max_failure_rate is not None and not 0 <= max_failure_rate <= 1:
        raise ValueError(f"max_failure_rate is a share from 0 to 1, not {max_failure_rate}")
    new_deadline = at + window_seconds(completion_window) if completion_window else None
    with early_end_lock(folder, batch_id):
        record = store.batch(batch_id)
        if not can_resume(record, folder):
            raise IllegalTransition(f"there is nothing to resume: batch {batch_id} {_why(record)}")
        set_damaged_decisions_aside(batch_id, folder, at=at)
        before = folder.resumption(batch_id).read()
        resumption = Resumption(
            at=at,
            actor=actor,
            reason=reason,
            deadline=new_deadline or (before.deadline if before else None),
            max_failure_rate=before.max_failure_rate
            if before and max_failure_rate is None
            else max_failure_rate,
        )
        if deadline(record, resumption) <= at:
            raise IllegalTransition(
                f"the completion window of batch {batch_id} is over:"
                " give it a new one, counted from now (--completion-window 24h)"
            )
        mark(folder, batch_id)
        folder.resumption(batch_id).write(resumption)
        crash_point(CrashPoint.AFTER_RESUMPTION)
        try:
            _carry_out(record, resumption, folder, store)
        except StoreLocked as locked:
            logger.info("%s is resumed at the next tick of dispatch_sensor: %s", batch_id, locked)
    return resumption


def can_resume(record: BatchRecord, folder: DataFolder) -> bool:
    """Whether a batch can be resumed: it was cancelled, has expired, or is paused."""
    return record.status in RESUMABLE or halt_in_force(folder, record.batch_id) is not None


def finish_resumptions(
    *, folder: DataFolder, store: Store, faults: Faults | None = None
) -> list[str]:
    """Carry out resumptions that were decided but interrupted, and return the batch ids.

    Args:
        faults: Collects batches whose decision cannot be read or carried out.

    Raises:
        StorageError: The store cannot be read.
    """
    finished, faults = [], faults or Faults()
    for record in store.records(marked(folder)).values():
        with faults.of(record.batch_id):
            if is_resumed(record, folder):
                with early_end_lock(folder, record.batch_id):
                    now = store.batch(record.batch_id)
                    resumption = folder.resumption(record.batch_id).read()
                    if now.status in RESUMABLE and resumption is not None:
                        _carry_out(now, resumption, folder, store)
                        finished.append(record.batch_id)
    return finished


def is_resumed(record: BatchRecord, folder: DataFolder) -> bool:
    """Whether a batch was resumed by a decision that is not in the store yet.

    Raises:
        StorageError: The decision cannot be read.
    """
    if record.status not in RESUMABLE:
        return False
    resumption = folder.resumption(record.batch_id).read()
    return resumption is not None and resumption.at > record.times[record.status]


def _carry_out(
    record: BatchRecord, resumption: Resumption, folder: DataFolder, store: Store
) -> None:
    # The files first: a run that starts right after must not find them.
    folder.halt(record.batch_id).remove()
    if record.status not in RESUMABLE:
        logger.info("%s continues after its pause", record.batch_id)
        return
    folder.early_end(record.batch_id).remove()
    crash_point(CrashPoint.AFTER_REOPENING)
    chunks = store.reopen_batch(
        record.batch_id,
        [*UNASKED_CODES.values()],
        at=resumption.at,
        actor=resumption.actor,
        reason=resumption.reason or "resumed",
    )
    logger.info("%s continues: %d chunks have requests without an answer", record.batch_id, chunks)


def _why(record: BatchRecord) -> str:
    if record.status is BatchStatus.CANCELLING:
        return "is being cancelled; resume it after its delivery"
    return f"is {record.status}"
