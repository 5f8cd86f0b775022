"""Room: whether one more batch fits beside what is queued, and if not, what it waits for."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from batch_orchestration.core.batches import MAX_REQUESTS_PER_BATCH
from batch_orchestration.queue.entries import WaitReason
from batch_orchestration.queue.rate_limits import SourceRates

#: Bytes of a batch file per token where nobody knows better: JSON and all.
BYTES_PER_TOKEN = 4
#: Shorter lines are no requests: method, URL, model and one message take more.
_BYTES_PER_REQUEST = 100
#: Tokens of an answer where nobody knows better.
_ANSWER_TOKENS = 256
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be queued at a time, over all batches.

    Attributes:
        unfinished_batches: Admitted and not ended.
        queued_requests: Of them, without an outcome.
        queued_tokens: Expected of these, prompt and answer together.
        disk_reserve_bytes: Free space that stays free.
        output_bytes_ratio: Journals, store and output of a request, per byte of its line.
        open_requests: Of one batch at a time: with more it takes room for so many only.
    """

    unfinished_batches: int = 5
    queued_requests: int = 100_000
    queued_tokens: int = 1_000_000_000
    disk_reserve_bytes: int = 2 * 2**30
    output_bytes_ratio: float = 3.0
    open_requests: int = MAX_REQUESTS_PER_BATCH


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a batch asks room for.

    Attributes:
        requests: None while nobody has read its file; so is `tokens`.
        size_bytes: Of its input, expanded.
        new_bytes: Bytes of input that are not on the disk yet.
    """

    requests: int | None
    tokens: int | None
    size_bytes: int
    new_bytes: int = 0

    def guessed(self, limits: Limits) -> "Demand":
        """Return it with a high guess in the place of what is not known."""
        requests = self.requests
        if requests is None:
            requests = min(self.size_bytes // _BYTES_PER_REQUEST + 1, limits.open_requests)
        tokens = rough_tokens(requests, self.size_bytes) if self.tokens is None else self.tokens
        return replace(self, requests=requests, tokens=tokens)

    def open_at_once(self, limits: Limits) -> "Demand":
        """Return what of it counts by the limits: its window. The disk takes all in the end."""
        if self.requests is None or self.requests <= limits.open_requests:
            return self
        share = limits.open_requests / self.requests
        tokens = None if self.tokens is None else round(self.tokens * share)
        return replace(self, requests=limits.open_requests, tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is queued at a moment.

    Attributes:
        owed_bytes: That batches at work will still write.
        free_bytes: On the disk now; None if that is not known, and not looked at.
        guessed: Whether requests and tokens of some are only guesses.
    """

    batches: int = 0
    requests: int = 0
    tokens: int = 0
    owed_bytes: int = 0
    free_bytes: int | None = None
    guessed: bool = False

    def plus(self, demand: Demand, limits: Limits) -> "Load":
        """Return the load with one more batch."""
        window = demand.open_at_once(limits)
        return replace(
            self,
            batches=self.batches + 1,
            requests=self.requests + (window.requests or 0),
            tokens=self.tokens + (window.tokens or 0),
            owed_bytes=self.owed_bytes + needed_bytes(demand, limits),
        )


class Blocker(NamedTuple):
    """What something waits for, and the same as a sentence with numbers."""

    reason: WaitReason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def check_capacity(demand: Demand, load: Load, limits: Limits) -> Blocker | None:
    """Return what keeps a batch from being admitted now; None if there is room for it.

    What is not known of it is not held against it.
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


def needed_bytes(demand: Demand, limits: Limits) -> int:
    """Return what a batch will write to the disk."""
    return demand.new_bytes + round(demand.size_bytes * limits.output_bytes_ratio)


def rough_tokens(requests: int, size_bytes: int) -> int:
    """Return about how many tokens requests will take, prompt and answer, by their bytes alone."""
    return size_bytes // BYTES_PER_TOKEN + requests * _ANSWER_TOKENS


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
    """Return why a source may not submit so much now; None if it may."""
    seconds = rates.retry_after(source, requests, now=now)
    if not seconds:
        return None
    what = "one more file" if requests is None else f"a file of {requests:,} requests"
    return Blocker(
        WaitReason.SUBMISSION_RATE,
        f"{what} may go in {seconds:,.0f} s; {rates.describe(source, now=now)}",
    )
