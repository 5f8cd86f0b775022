"""What each source has submitted, as batches and submissions tell: no counter that can be torn."""

from collections.abc import Iterable, Iterator

from batch_orchestration.domain.batches import BatchStatus
from batch_orchestration.domain.commits import BatchRecord
from batch_orchestration.domain.members import Faults
from batch_orchestration.domain.rates import RateLimits, SourceRates, SubmissionEvent
from batch_orchestration.domain.submissions import submission_of
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.store import Store


def read_rates(
    folder: DataFolder,
    records: Iterable[BatchRecord],
    *,
    limits: RateLimits,
    faults: Faults | None = None,
) -> SourceRates:
    """Return what the sources have submitted so far.

    Args:
        folder: The data folder.
        records: All batches of the store.
        limits: In force.
        faults: Takes submissions that cannot be read: they do not count.
    """
    events = (*_of_batches(records), *_of_submissions(folder, faults or Faults()))
    return SourceRates(limits=limits, events=events)


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
    records = store.batches() if folder.duckdb.exists() else []
    return read_rates(folder, records, limits=limits).retry_after(source, requests, now=now)


def _of_batches(records: Iterable[BatchRecord]) -> Iterator[SubmissionEvent]:
    for record in records:
        if submission_of(record.batch_id) is None:
            at = record.times[BatchStatus.VALIDATING]
            yield SubmissionEvent(record.source, at, record.total)


def _of_submissions(folder: DataFolder, faults: Faults) -> Iterator[SubmissionEvent]:
    for submission_id in folder.submission_ids():
        with faults.of(submission_id):
            submission = folder.read_submission(submission_id)
            yield SubmissionEvent(submission.source, submission.created_at, submission.requests)
