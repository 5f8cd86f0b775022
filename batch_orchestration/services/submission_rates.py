"""What each source has submitted, as batches and submissions tell: no counter that can be torn."""

import os
from collections.abc import Iterator

from batch_orchestration.domain.batches import BatchStatus
from batch_orchestration.domain.members import Faults
from batch_orchestration.domain.rates import (
    SECONDS_PER_HOUR,
    RateLimits,
    SourceRates,
    SubmissionEvent,
)
from batch_orchestration.domain.submissions import Submission, submission_of
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.store import Store
from batch_orchestration.storage.unfinished import marked


def read_rates(
    folder: DataFolder,
    store: Store,
    *,
    limits: RateLimits,
    now: float,
    faults: Faults | None = None,
) -> SourceRates:
    """Return what the sources have submitted, as far as the limits remember it.

    Args:
        folder: The data folder.
        store: The store.
        limits: In force.
        now: POSIX seconds.
        faults: Takes submissions that cannot be read: they do not count.

    Raises:
        StorageError: The store cannot be read.
    """
    of_batches = _of_batches(store, limits, now) if folder.duckdb.exists() else ()
    of_submissions = _of_submissions(folder, Faults() if faults is None else faults)
    return SourceRates(limits=limits, events=(*of_batches, *of_submissions))


def submission_event(submission: Submission) -> SubmissionEvent:
    """Return what a file that was split counts as."""
    return SubmissionEvent(submission.source, submission.created_at, submission.requests)


def retry_after_seconds(
    source: str, requests: int | None, *, folder: DataFolder, store: Store, limits: RateLimits,
    now: float,
) -> float:  # fmt: skip
    """Return in how many seconds a source may submit a file; 0 if it may now.

    What waits in the inbox has not been submitted as far as this counts.

    Args:
        source: Who.
        requests: Of the file; None if nobody has counted them.
        limits: In force.
        now: POSIX seconds.

    Raises:
        StorageError: The store cannot be read.
    """
    rates = read_rates(folder, store, limits=limits, now=now)
    return rates.retry_after(source, requests, now=now)


def _of_batches(store: Store, limits: RateLimits, now: float) -> Iterator[SubmissionEvent]:
    submitted = store.submitted(
        since=now - limits.memory_seconds,
        requests_per_second=limits.requests.per_hour / SECONDS_PER_HOUR,
        now=now,
    )
    for record in submitted:
        if submission_of(record.batch_id) is None:
            at = record.times[BatchStatus.VALIDATING]
            yield SubmissionEvent(record.source, at, record.total)


def _of_submissions(folder: DataFolder, faults: Faults) -> Iterator[SubmissionEvent]:
    """Yield them from the index: a submission that is off it is forgotten by the limits."""
    for name in marked(folder):
        with faults.of(name):
            if os.path.lexists(folder.submission_path(name)):
                yield submission_event(folder.read_submission(name))
