"""The demand of one batch on the queue, and the limits of the queue."""

from dataclasses import dataclass, replace

from batch_orchestration.core.batches import MAX_REQUESTS_PER_BATCH

#: Bytes of a batch file per token, JSON syntax included; used where no estimate exists.
BYTES_PER_TOKEN = 4
#: Lower bound for a request line: method, URL, model and one message already take more.
_BYTES_PER_REQUEST = 100
#: Tokens of an answer; used where no estimate exists.
_ANSWER_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on the queue, over all batches.

    Attributes:
        unfinished_batches: Batches that are admitted and not ended.
        queued_requests: Requests of those batches without an outcome.
        queued_tokens: Expected tokens of those requests, prompt and answer together.
        disk_reserve_bytes: Disk space that must stay free.
        output_bytes_ratio: Bytes in journals, store and output per byte of a request's line.
        open_requests: Window of one batch: a larger batch counts with this many requests.
    """

    unfinished_batches: int = 5
    queued_requests: int = 100_000
    queued_tokens: int = 1_000_000_000
    disk_reserve_bytes: int = 2 * 2**30
    output_bytes_ratio: float = 3.0
    open_requests: int = MAX_REQUESTS_PER_BATCH


@dataclass(frozen=True, kw_only=True)
class Demand:
    """Capacity that a batch needs.

    Attributes:
        requests: None until the file is read, as is `tokens`.
        size_bytes: Size of the input after decompression.
        new_bytes: Input bytes that are not on the disk yet.
    """

    requests: int | None
    tokens: int | None
    size_bytes: int
    new_bytes: int = 0

    def guessed(self, limits: Limits) -> "Demand":
        """Return the demand with unknown figures replaced by a high guess."""
        requests = self.requests
        if requests is None:
            requests = min(self.size_bytes // _BYTES_PER_REQUEST + 1, limits.open_requests)
        tokens = rough_tokens(requests, self.size_bytes) if self.tokens is None else self.tokens
        return replace(self, requests=requests, tokens=tokens)

    def open_at_once(self, limits: Limits) -> "Demand":
        """Return the part that counts towards the queue limits: one window.

        Disk space is needed for the whole batch, so the byte counts stay.
        """
        if self.requests is None or self.requests <= limits.open_requests:
            return self
        share = limits.open_requests / self.requests
        tokens = None if self.tokens is None else round(self.tokens * share)
        return replace(self, requests=limits.open_requests, tokens=tokens)


def needed_bytes(demand: Demand, limits: Limits) -> int:
    """Return the bytes that a batch will write to the disk, its new input included."""
    return demand.new_bytes + round(demand.size_bytes * limits.output_bytes_ratio)


def rough_tokens(requests: int, size_bytes: int) -> int:
    """Return a rough count of prompt and answer tokens, based on the size of the requests alone."""
    return size_bytes // BYTES_PER_TOKEN + requests * _ANSWER_TOKENS
