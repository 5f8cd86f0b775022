"""Completion: the final status of a batch whose files are delivered, and the status before it."""

import logging
from dataclasses import dataclass

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.lifecycle import FINAL, EarlyEnd
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.lifecycle.cancellation import early_end_in_force, early_end_lock
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """The end of a batch whose files are being written.

    Attributes:
        status: The final status.
        reached: Whether the batch has this status already: its files are then written once more.
        early_end: None if the batch does not end early.
    """

    batch_id: str
    status: BatchStatus
    reached: bool
    early_end: EarlyEnd | None


def begin_ending(
    batch_id: str, *, folder: DataFolder, store: Store, at: float, actor: str
) -> Ending:
    """Decide how the batch ends, and set the status before the final one.

    From here on the batch cannot be cancelled any more.

    Raises:
        BatchNotFound: The batch is not in the store.
        IllegalTransition: The batch cannot end now.
    """
    with early_end_lock(folder, batch_id):
        record = store.batch(batch_id)
        early_end = early_end_in_force(folder, record)
        if record.status in FINAL:
            return Ending(
                batch_id=batch_id, status=record.status, reached=True, early_end=early_end
            )
        step, by, reason = _first_step(early_end, actor)
        store.set_status(
            batch_id, step, at=early_end.at if early_end else at, actor=by, reason=reason
        )
        status = early_end.status if early_end else BatchStatus.COMPLETED
        return Ending(batch_id=batch_id, status=status, reached=False, early_end=early_end)


def finish_ending(
    ending: Ending, *, folder: DataFolder, store: Store, at: float, actor: str, reason: str
) -> None:
    """Set the final status of the batch, once its files are in place."""
    if ending.reached:
        return
    with early_end_lock(folder, ending.batch_id):
        store.set_status(ending.batch_id, ending.status, at=at, actor=actor, reason=reason)
        if ending.early_end is None and (late := folder.early_end(ending.batch_id).read()):
            logger.warning("%s is completed; too late: %s", ending.batch_id, late)
            folder.early_end(ending.batch_id).remove()


def _first_step(early_end: EarlyEnd | None, actor: str) -> tuple[BatchStatus, str, str]:
    """Return the status before the final one, its actor and its reason."""
    if early_end is None:
        return BatchStatus.FINALIZING, actor, "every request has an outcome"
    if early_end.status is BatchStatus.CANCELLED:
        return BatchStatus.CANCELLING, early_end.actor, early_end.reason
    return BatchStatus.FINALIZING, early_end.actor, early_end.reason
