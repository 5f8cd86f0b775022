"""Submissions of each source, derived from the stored batches: no counter can get out of step."""

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.rate_limits import (
    SECONDS_PER_HOUR,
    RateLimits,
    SourceRates,
    SubmissionEvent,
)
from batch_orchestration.store.store import Store


def read_rates(folder: DataFolder, store: Store, *, limits: RateLimits, now: float) -> SourceRates:
    """Return the submissions of all sources that still count towards the limits.

    Raises:
        StorageError: The store cannot be read.
    """
    if not folder.duckdb.exists():
        return SourceRates(limits=limits)
    submitted = store.submitted(
        since=now - limits.memory_seconds,
        requests_per_second=limits.requests.per_hour / SECONDS_PER_HOUR,
        now=now,
    )
    events = (
        SubmissionEvent(record.source, record.times[BatchStatus.VALIDATING], record.total)
        for record in submitted
    )
    return SourceRates(limits=limits, events=tuple(events))


def retry_after_seconds(
    source: str, requests: int | None, *, folder: DataFolder, store: Store, limits: RateLimits,
    now: float,
) -> float:  # fmt: skip
    """Return the seconds until a source may submit a file; 0 if it may submit now.

    Files that wait in the inbox do not count as submitted.

    Args:
        requests: Requests of the file; None if they were not counted.

    Raises:
        StorageError: The store cannot be read.
    """
    rates = read_rates(folder, store, limits=limits, now=now)
    return rates.retry_after(source, requests, now=now)
