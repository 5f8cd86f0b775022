"""What each source has submitted, as the batches tell: no counter that can be torn."""

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
    """Return what the sources have submitted, as far as the limits remember it.

    Args:
        folder: The data folder.
        store: The store.
        limits: In force.
        now: POSIX seconds.

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
