"""Pausing a batch of which too many requests fail, until a person has looked.

The decision is a file beside the plan (`halted.json`) before anything follows from it. The run at
work then gives the engine none of the batch's requests any more, and settles what the engine has.
The batch stays `in_progress`; its completion window goes on counting. It asks for no run, takes no
room from others until a person resumes or cancels it, or its window is over. A resumption that is
younger than the decision ends it, whether or not the file is gone.
"""

import contextlib
import logging
import time

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.lifecycle import FailedRequest, Resumption
from batch_orchestration.core.outcomes import Completion, Outcome
from batch_orchestration.core.requests import Request
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal_records import OutcomeRecord, read_records
from batch_orchestration.inference.faults.failure_rate import (
    LATEST_OUTCOMES,
    FailureRate,
    failed_request,
)
from batch_orchestration.lifecycle.cancellation import early_end_lock

logger = logging.getLogger(__name__)


class FailureWatch:
    """Judges the outcomes of a batch as a run gets them, and pauses it where too many fail.

    What earlier runs got since the batch was admitted, or last resumed, is read from the journals.

    Args:
        plan: Of the batch.
        folder: The data folder.
        run_id: Of the run.
        default: Share of failures up to which a batch goes on whose author does not say it.
    """

    def __init__(self, plan: BatchPlan, folder: DataFolder, *, run_id: str, default: float) -> None:
        self._plan = plan
        self._folder = folder
        self._run_id = run_id
        self._resumption = folder.read_resumption(plan.batch_id)
        most = _most_failures(plan, self._resumption, default)
        since = self._resumption.at if self._resumption else 0.0
        self._rate = FailureRate(most, () if most >= 1 else _earlier(plan, folder, since=since))

    def note(self, outcome: Outcome, request: Request, *, unasked: int) -> bool:
        """Take in an outcome that has just become durable; return whether it pauses the batch.

        Args:
            outcome: Of the request.
            request: That it is about.
            unasked: Requests that a pause spares; without any there is nothing to pause.
        """
        if isinstance(outcome, Completion):
            self._rate.record(None)
            return False
        self._rate.record(failed_request(request.index, request.custom_id, outcome))
        if unasked <= 0 or not self._rate.is_exceeded:
            return False
        try:
            return self._decide()
        except StorageError as error:
            # A full disk pauses a run and does not end it; the next failure decides again.
            logger.warning("%s cannot be paused now: %s", self._plan.batch_id, error)
            return False

    def _decide(self) -> bool:
        """Keep the decision, unless somebody has decided since; return whether the run lets go."""
        batch_id = self._plan.batch_id
        halt = self._rate.halt(at=time.time(), actor=self._run_id)
        with early_end_lock(self._folder, batch_id):
            if self._folder.read_closing(batch_id) is not None:
                return False
            if self._folder.read_resumption(batch_id) != self._resumption:
                # These outcomes are from before; the next run judges those that come after.
                return True
            self._folder.write_halt(batch_id, halt)
        crash_point(CrashPoint.AFTER_HALT)
        logger.error(
            "%s is paused: %d of its latest %d requests failed; `status %s` shows why",
            batch_id,
            halt.failed,
            halt.judged,
            batch_id,
        )
        return True


def _most_failures(plan: BatchPlan, resumption: Resumption | None, default: float) -> float:
    if resumption is not None and resumption.max_failure_rate is not None:
        return resumption.max_failure_rate
    said = plan.options.max_failure_rate
    return default if said is None else said


def _earlier(plan: BatchPlan, folder: DataFolder, *, since: float) -> list[FailedRequest | None]:
    """Return the latest outcomes that came after a moment, by the youngest of the journals."""
    found: list[tuple[float, FailedRequest | None]] = []
    # The journals tell a statistic here; a run that cannot read one of its own says so.
    with contextlib.suppress(OSError):
        paths = folder.journal_path(plan.batch_id, 0).parent.glob("*.journal")
        journals = sorted(((path.stat().st_mtime, path) for path in paths), reverse=True)
        for written_at, path in journals:
            if written_at < since or len(found) >= LATEST_OUTCOMES:
                break
            found += (
                (record.at, _failed(record))
                for record in read_records(path)
                # Without an attempt it is a fault that admission found.
                if isinstance(record, OutcomeRecord) and record.attempt and record.at > since
            )
    found.sort(key=lambda outcome: outcome[0])
    return [failed for _, failed in found[-LATEST_OUTCOMES:]]


def _failed(record: OutcomeRecord) -> FailedRequest | None:
    if isinstance(record.outcome, Completion):
        return None
    return failed_request(record.index, record.custom_id, record.outcome)
