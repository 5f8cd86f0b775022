"""Ending a whole submission early, and going on with it: part by part.

There is no decision but those of the parts, so whatever is killed in between, doing it again does
what is left.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from batch_orchestration.domain.batches import BatchStatus
from batch_orchestration.domain.errors import (
    BatchOrchestrationError,
    FileDamaged,
    IllegalTransition,
)
from batch_orchestration.domain.lifecycle import Closing, Resumption
from batch_orchestration.services.closing import Cancellation, cancel
from batch_orchestration.services.parts import admit_closed
from batch_orchestration.services.resuming import can_resume, resume
from batch_orchestration.services.submission_status import is_submission
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class CancelledParts:
    """The parts that are cancelled, and why others are not: they have ended, or are about to."""

    cancelled: Mapping[str, Cancellation]
    left: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ResumedParts:
    """The parts that go on, and why others do not."""

    resumed: Mapping[str, Resumption]
    left: Mapping[str, str]


def cancel_any(
    name: str, *, folder: DataFolder, store: Store, actor: str, reason: str, at: float
) -> CancelledParts:
    """Cancel a batch or a submission; see `closing.cancel` and `cancel_submission`."""
    if is_submission(name, folder=folder):
        return cancel_submission(
            name, folder=folder, store=store, actor=actor, reason=reason, at=at
        )
    one = cancel(name, folder=folder, store=store, actor=actor, reason=reason, at=at)
    return CancelledParts(cancelled={name: one}, left={})


def resume_any(
    name: str,
    *,
    folder: DataFolder,
    store: Store,
    actor: str,
    reason: str = "",
    completion_window: str | None = None,
    max_failure_rate: float | None = None,
    at: float,
) -> ResumedParts:
    """Go on with a batch or a submission; see `resuming.resume` and `resume_submission`."""
    go_on = resume_submission if is_submission(name, folder=folder) else _resume_one
    return go_on(
        name,
        folder=folder,
        store=store,
        actor=actor,
        reason=reason,
        completion_window=completion_window,
        max_failure_rate=max_failure_rate,
        at=at,
    )


def _resume_one(batch_id: str, **how: Any) -> ResumedParts:
    return ResumedParts(resumed={batch_id: resume(batch_id, **how)}, left={})


def cancel_submission(
    submission_id: str, *, folder: DataFolder, store: Store, actor: str, reason: str, at: float
) -> CancelledParts:
    """Cancel every part of a submission that is not final. Doing it again changes nothing.

    Parts that wait become batches that never run, whatever the limits: nothing is inferred for
    them. The submission's files are assembled when the last part is delivered.

    Args:
        submission_id: Of the submission.
        folder: The data folder.
        store: The store.
        actor: Run or person.
        reason: Why, for people.
        at: POSIX seconds.

    Raises:
        BatchNotFound: There is no such submission.
        IllegalTransition: There is nothing left to cancel; the message says why.
        StorageError: Parts that wait could not be cancelled now; those at work are.
    """
    parts = folder.read_submission(submission_id).parts
    cancelled: dict[str, Cancellation] = {}
    left: dict[str, str] = {}

    def cancel_admitted() -> None:
        for part_id in parts:
            if part_id in left or not os.path.lexists(folder.plan_path(part_id)):
                continue
            try:
                one = cancel(part_id, folder=folder, store=store, actor=actor, reason=reason, at=at)
                cancelled.setdefault(part_id, one)
            except (IllegalTransition, FileDamaged) as error:
                left[part_id] = str(error)

    # Those at work first, for the others may have to wait for an admission. Then once more all of
    # them: the store may not have known of a part whose cancellation was killed.
    cancel_admitted()
    closing = Closing(status=BatchStatus.CANCELLED, at=at, actor=actor, reason=reason)
    closed = admit_closed(parts, closing, folder=folder, store=store, at=at)
    cancel_admitted()
    for part_id in cancelled.keys() & closed:
        cancelled[part_id] = replace(cancelled[part_id], earlier=False)
    if not cancelled:
        raise IllegalTransition(
            f"there is nothing to cancel: all parts of submission {submission_id} have ended, or"
            f" have an outcome for every request"
        )
    return CancelledParts(cancelled=cancelled, left=left)


def resume_submission(
    submission_id: str,
    *,
    folder: DataFolder,
    store: Store,
    actor: str,
    reason: str = "",
    completion_window: str | None = None,
    max_failure_rate: float | None = None,
    at: float,
) -> ResumedParts:
    """Go on with every part of a submission that is paused, was cancelled or has expired.

    Args:
        submission_id: Of the submission.
        folder: The data folder.
        store: The store.
        actor: Run or person.
        reason: Why, for people.
        completion_window: A new one, counted from now; parts whose window is over need it.
        max_failure_rate: A new one, 0 to 1, of these parts.
        at: POSIX seconds.

    Raises:
        BatchNotFound: There is no such submission.
        IllegalTransition: No part can be resumed; the message says why.
        ValueError: The window is no duration.
        StoreLocked: Some parts may go on already; do it again.
    """
    parts = folder.read_submission(submission_id).parts
    records = store.records(parts)
    statuses = {part_id: record.status for part_id, record in records.items()}
    resumed: dict[str, Resumption] = {}
    left: dict[str, str] = {}
    refused: list[BatchOrchestrationError] = []
    for part_id in parts:
        status = statuses.get(part_id, BatchStatus.VALIDATING)
        record = records.get(part_id)
        try:
            if record is None or not can_resume(record, folder):
                left[part_id] = f"batch {part_id} is {status}"
                continue
            resumed[part_id] = resume(
                part_id,
                folder=folder,
                store=store,
                actor=actor,
                reason=reason,
                completion_window=completion_window,
                max_failure_rate=max_failure_rate,
                at=at,
            )
        except (IllegalTransition, FileDamaged) as error:
            refused.append(error)
            left[part_id] = str(error)
    if not resumed and refused:
        raise refused[0]
    if not resumed:
        words = ", ".join(sorted({statuses.get(p, BatchStatus.VALIDATING) for p in parts}))
        raise IllegalTransition(
            f"there is nothing to resume: the parts of submission {submission_id} are {words}"
        )
    return ResumedParts(resumed=resumed, left=left)
