"""Room: whether one more batch fits beside what is queued, and if not, what it waits for."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from batch_orchestration.domain.queueing import WaitReason

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
    """

    unfinished_batches: int = 5
    queued_requests: int = 100_000
    queued_tokens: int = 1_000_000_000
    disk_reserve_bytes: int = 2 * 2**30
    output_bytes_ratio: float = 3.0


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

    def guessed(self, *, most_requests: int) -> "Demand":
        """Return it with a high guess in the place of what is not known.

        Args:
            most_requests: Of one batch.
        """
        requests = self.requests
        if requests is None:
            requests = min(self.size_bytes // _BYTES_PER_REQUEST + 1, most_requests)
        tokens = rough_tokens(requests, self.size_bytes) if self.tokens is None else self.tokens
        return replace(self, requests=requests, tokens=tokens)


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
        return replace(
            self,
            batches=self.batches + 1,
            requests=self.requests + (demand.requests or 0),
            tokens=self.tokens + (demand.tokens or 0),
            owed_bytes=self.owed_bytes + needed_bytes(demand, limits),
        )


class Obstacle(NamedTuple):
    """What something waits for, and the same as a sentence with numbers."""

    reason: WaitReason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def find_obstacle(demand: Demand, load: Load, limits: Limits) -> Obstacle | None:
    """Return what keeps a batch from being admitted now; None if there is room for it.

    What is not known of it is not held against it.
    """
    if load.batches >= limits.unfinished_batches:
        return Obstacle(
            WaitReason.QUEUE_FULL,
            f"{load.batches:,} batches are unfinished; {limits.unfinished_batches:,} may be at a"
            " time",
        )
    return (
        _over(WaitReason.REQUESTS_QUEUED, demand.requests, load.requests, limits.queued_requests)
        or _over(WaitReason.TOKENS_QUEUED, demand.tokens, load.tokens, limits.queued_tokens)
        or _disk(demand, load, limits)
    )


def needed_bytes(demand: Demand, limits: Limits) -> int:
    """Return what a batch will write to the disk."""
    return demand.new_bytes + round(demand.size_bytes * limits.output_bytes_ratio)


def rough_tokens(requests: int, size_bytes: int) -> int:
    """Return about how many tokens requests will take, prompt and answer, by their bytes alone."""
    return size_bytes // BYTES_PER_TOKEN + requests * _ANSWER_TOKENS


def _over(reason: WaitReason, wanted: int | None, queued: int, limit: int) -> Obstacle | None:
    if wanted is None or queued + wanted <= limit:
        return None
    what = "requests" if reason is WaitReason.REQUESTS_QUEUED else "expected tokens"
    if wanted > limit:
        setting = f"BATCH_MAX_QUEUED_{what.split()[-1].upper()}"
        return Obstacle(
            reason,
            f"its {wanted:,} {what} alone are more than the {limit:,} that may be queued at a time"
            f" ({setting})",
        )
    return Obstacle(
        reason,
        f"its {wanted:,} {what} and the {queued:,} queued are more than the {limit:,} that may be"
        " queued at a time",
    )


def _disk(demand: Demand, load: Load, limits: Limits) -> Obstacle | None:
    if load.free_bytes is None:
        return None
    needed = needed_bytes(demand, limits)
    if load.free_bytes - load.owed_bytes - needed >= limits.disk_reserve_bytes:
        return None
    return Obstacle(
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
