"""Queue capacity: whether one more batch fits beside the queued ones, and its blocker if not."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from batch_orchestration.queue.demand import Demand, Limits, needed_bytes
from batch_orchestration.queue.entries import WaitReason
from batch_orchestration.queue.rate_limits import SourceRates

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, kw_only=True)
class Load:
    """Work that is queued at one moment.

    Attributes:
        owed_bytes: Bytes that unfinished batches will still write.
        free_bytes: Free disk space; None if unknown, which skips the disk check.
        guessed: Whether `requests` and `tokens` include guesses.
    """

    batches: int = 0
    requests: int = 0
    tokens: int = 0
    owed_bytes: int = 0
    free_bytes: int | None = None
    guessed: bool = False

    def plus(self, demand: Demand, limits: Limits) -> "Load":
        """Return the load with one more batch added."""
        window = demand.open_at_once(limits)
        return replace(
            self,
            batches=self.batches + 1,
            requests=self.requests + (window.requests or 0),
            tokens=self.tokens + (window.tokens or 0),
            owed_bytes=self.owed_bytes + needed_bytes(demand, limits),
        )


class Blocker(NamedTuple):
    """The reason for which an entry waits, and a sentence that explains it with numbers."""

    reason: WaitReason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def check_capacity(demand: Demand, load: Load, limits: Limits) -> Blocker | None:
    """Return the blocker that keeps a batch from being admitted now; None if it fits.

    Unknown figures of the demand are not checked.
    """
    if load.batches >= limits.unfinished_batches:
        return Blocker(
            WaitReason.QUEUE_FULL,
            f"{load.batches:,} batches are unfinished; {limits.unfinished_batches:,} may be at a"
            " time",
        )
    window = demand.open_at_once(limits)
    whose = "its" if window == demand else "its first"
    return (
        _over(WaitReason.REQUESTS_QUEUED, whose, window.requests, load.requests, limits)
        or _over(WaitReason.TOKENS_QUEUED, whose, window.tokens, load.tokens, limits)
        or _disk(demand, load, limits)
    )


def _over(
    reason: WaitReason, whose: str, wanted: int | None, queued: int, limits: Limits
) -> Blocker | None:
    if reason is WaitReason.REQUESTS_QUEUED:
        limit, what = limits.queued_requests, "requests"
    else:
        limit, what = limits.queued_tokens, "expected tokens"
    if wanted is None or queued + wanted <= limit:
        return None
    if wanted > limit:
        setting = f"BATCH_MAX_QUEUED_{what.split()[-1].upper()}"
        return Blocker(
            reason,
            f"{whose} {wanted:,} {what} alone are more than the {limit:,} that may be queued at a"
            f" time ({setting})",
        )
    return Blocker(
        reason,
        f"{whose} {wanted:,} {what} and the {queued:,} queued are more than the {limit:,} that may"
        " be queued at a time",
    )


def _disk(demand: Demand, load: Load, limits: Limits) -> Blocker | None:
    if load.free_bytes is None:
        return None
    needed = needed_bytes(demand, limits)
    if load.free_bytes - load.owed_bytes - needed >= limits.disk_reserve_bytes:
        return None
    return Blocker(
        WaitReason.DISK_LOW,
        f"it needs about {_size(needed)}, what is queued {_size(load.owed_bytes)}; of"
        f" {_size(load.free_bytes)} free {_size(limits.disk_reserve_bytes)} stay in reserve",
    )


def _size(size_bytes: float) -> str:
    for unit in _UNITS:
        if size_bytes < 1024 or unit == _UNITS[-1]:
            break
        size_bytes /= 1024
    return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"


def rate_blocker(
    rates: SourceRates, source: str, requests: int | None, *, now: float
) -> Blocker | None:
    """Return the blocker if a source exceeds its submission rate; None if it may submit now."""
    seconds = rates.retry_after(source, requests, now=now)
    if not seconds:
        return None
    what = "one more file" if requests is None else f"a file of {requests:,} requests"
    return Blocker(
        WaitReason.SUBMISSION_RATE,
        f"{what} may go in {seconds:,.0f} s; {rates.describe(source, now=now)}",
    )
