"""Pauses a batch when too many of its requests fail, until an operator decides.

The decision is written to a file beside the plan (`halted.json`) before it takes effect. The run in
progress then gives the engine no more of the batch's requests, and settles those that the engine
has. The batch stays `in_progress`, and its completion window continues. It asks for no run and
takes no capacity until an operator resumes or cancels it, or its window ends. A resumption newer
than the decision ends the pause, whether or not the file is gone.
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
    """Judges the outcomes of a batch as a run receives them, and pauses it if too many fail.

    Outcomes of earlier runs since admission or the last resumption are read from the journals.

    Args:
        default: Share of failures up to which a batch goes on if its author sets none.
    """

    def __init__(self, plan: BatchPlan, folder: DataFolder, *, run_id: str, default: float) -> None:
        self._plan = plan
        self._folder = folder
        self._run_id = run_id
        self._resumption = folder.resumption(plan.batch_id).read()
        most = _most_failures(plan, self._resumption, default)
        since = self._resumption.at if self._resumption else 0.0
        self._rate = FailureRate(most, () if most >= 1 else _earlier(plan, folder, since=since))

    def note(self, outcome: Outcome, request: Request, *, unasked: int) -> bool:
        """Add an outcome that has just become durable; return whether it pauses the batch.

        Args:
            unasked: Requests that a pause would spare; if there are none, the batch does not pause.
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
            # A full disk does not end a run; the next failure tries again.
            logger.warning("%s cannot be paused now: %s", self._plan.batch_id, error)
            return False

    def _decide(self) -> bool:
        """Write the decision unless it is outdated; return whether the run leaves the batch."""
        batch_id = self._plan.batch_id
        halt = self._rate.halt(at=time.time(), actor=self._run_id)
        with early_end_lock(self._folder, batch_id):
            if self._folder.early_end(batch_id).read() is not None:
                return False
            if self._folder.resumption(batch_id).read() != self._resumption:
                # These outcomes predate the resumption; the next run judges later ones.
                return True
            self._folder.halt(batch_id).write(halt)
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
    own = plan.options.max_failure_rate
    return default if own is None else own


def _earlier(plan: BatchPlan, folder: DataFolder, *, since: float) -> list[FailedRequest | None]:
    """Return the latest outcomes after `since`, from the newest journals."""
    found: list[tuple[float, FailedRequest | None]] = []
    # Only a statistic is needed here; a run that cannot read its own journal reports that itself.
    with contextlib.suppress(OSError, StorageError):
        paths = folder.journal_path(plan.batch_id, 0).parent.glob("*.journal")
        journals = sorted(((path.stat().st_mtime, path) for path in paths), reverse=True)
        for written_at, path in journals:
            if written_at < since or len(found) >= LATEST_OUTCOMES:
                break
            found += (
                (record.at, _failed(record))
                for record in read_records(path)
                # An outcome without an attempt is a fault found at admission.
                if isinstance(record, OutcomeRecord) and record.attempt and record.at > since
            )
    found.sort(key=lambda outcome: outcome[0])
    return [failed for _, failed in found[-LATEST_OUTCOMES:]]


def _failed(record: OutcomeRecord) -> FailedRequest | None:
    if isinstance(record.outcome, Completion):
        return None
    return failed_request(record.index, record.custom_id, record.outcome)
