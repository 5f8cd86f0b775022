"""Derives window, engine flags and chunk size from the known facts, each with its reason.

Each function documents its formula and returns the derivation in words beside the value. None means
unknown: the default then applies, and the words name it as such.
"""

import math
from collections.abc import Sequence

import msgspec

from batch_orchestration.estimates.costs import Costs, work_shared
from batch_orchestration.estimates.estimate import Estimate

#: Default number of requests in flight: as many as vLLM computes together by default.
DEFAULT_IN_FLIGHT = 256
#: Limit on every window: each request in flight is a connection, and a suspect if the engine dies.
MOST_IN_FLIGHT = 1024
#: Requests that should wait at the engine, as a share of the running ones plus a constant. They
#: fill steps while an answer travels back and the next request travels out.
QUEUE_SHARE, QUEUE_LEAST = 0.125, 2
#: Cost of reading a token, relative to writing one: the default without measurements (as in
#: `estimates.costs.GUESSED`), and the range of values accepted from measurements, which separate
#: the two only roughly.
READING_COST, LEAST_READING_COST, MOST_READING_COST = 0.1, 0.02, 0.5
#: Usable share of the KV cache: the tokens that running sequences hold vary by a few per cent.
KV_SHARE = 0.95
#: Slots relative to the sequences that fit on average. Lengths differ, and with this surplus the
#: cache is the limit, not the slots.
SLOTS_SHARE = 1.25
#: Range of slots: from those of the lowest memory level to vLLM's largest default.
FEWEST_SEQUENCES, MOST_SEQUENCES = 8, 1024
#: Limit on a CPU, where the time of a step grows with each sequence; above vLLM's own default.
MOST_SEQUENCES_ON_CPU = 128
#: Limit on the share of a device's memory, even if all of it is free: vLLM's accounting omits CUDA
#: graphs and NCCL's buffers.
MOST_MEMORY_SHARE = 0.95
MEMORY_MARGIN_BYTES, MEMORY_MARGIN_SHARE = 2**30, 0.05
#: Target time between two commits: half of it is too fast to follow, twice as much shows progress
#: late.
COMMIT_SECONDS = 60.0
DEFAULT_CHUNK, SMALLEST_CHUNK, LARGEST_CHUNK = 1000, 50, 5000
_GIB = 2**30


class RequestTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Average tokens of a batch's requests, which determine their share of the KV cache."""

    prompt: float
    completion: float

    @property
    def held(self) -> float:
        """Average tokens of a running sequence: its prompt and half of its answer."""
        return max(1.0, self.prompt + self.completion / 2)


def request_tokens(estimates: Sequence[Estimate | None]) -> RequestTokens | None:
    """Return the average tokens of the requests of several batches; None without an estimate."""
    known = [each for each in estimates if each is not None and each.requests]
    requests = sum(each.requests for each in known)
    if not requests:
        return None
    return RequestTokens(
        prompt=sum(each.prompt_tokens.mid for each in known) / requests,
        completion=sum(each.completion_tokens.mid for each in known) / requests,
    )


class Derived(msgspec.Struct, frozen=True, kw_only=True):
    """A figure and its derivation in words, logged as `window 384 = …`."""

    name: str
    value: int | float
    why: str

    def __str__(self) -> str:
        return f"{self.name} {self.value:,} = {self.why}"


def window(
    *,
    kv_cache_tokens: int | None,
    max_num_seqs: int | None,
    tokens: RequestTokens | None,
    most: int = MOST_IN_FLIGHT,
) -> Derived:
    """Return the initial window of an engine.

        running = min(max_num_seqs, 0.95 x KV cache tokens / tokens that a running sequence holds)
        window  = running + 2 + running / 8

    vLLM admits as many requests as fit its slots and cache and queues the rest
    (v1/core/sched/scheduler.py); with the surplus there is always one to admit. From then on
    `inference.window.control` adjusts the window to the engine's metrics.
    """
    bounds, words = list[float](), list[str]()
    if max_num_seqs is not None:
        bounds.append(max_num_seqs)
        words.append(f"{max_num_seqs:,} sequences at a time")
    if kv_cache_tokens is not None and tokens is not None:
        bounds.append(sequences_held(kv_cache_tokens, tokens))
        words.append(f"{KV_SHARE} x {kv_cache_tokens:,} tokens of KV cache / {_held(tokens)}")
    if not bounds:
        value = min(most, DEFAULT_IN_FLIGHT)
        return Derived(name="window", value=value, why="the default: the engine is not known yet")
    running = max(1, math.floor(min(bounds)))
    queue = queued(running)
    why = f"{running:,} running ({'; or '.join(words)}) + {queue:,} waiting at the engine"
    if running + queue > most:
        why += f", at most {most:,}"
    return Derived(name="window", value=min(most, running + queue), why=why)


def sequences_held(kv_cache_tokens: int, tokens: RequestTokens) -> float:
    """Return the number of running sequences that fit: 0.95 x KV cache tokens / tokens of each."""
    return KV_SHARE * kv_cache_tokens / tokens.held


def reading_cost(costs: Costs | None, *, at_a_time: float) -> float:
    """Return the cost of reading a token relative to writing one, from measured costs.

        prompt / (answer + step / at a time), from 0.02 to 0.5

    The window control weighs preempted sequences, which are read again, against a wider batch.
    """
    if costs is None:
        return READING_COST
    writing = costs.completion_token + costs.step / max(1, at_a_time)
    if not writing:
        return READING_COST
    return max(LEAST_READING_COST, min(MOST_READING_COST, costs.prompt_token / writing))


def queued(running: float) -> int:
    """Return the number of requests that should wait at an engine beside the running ones."""
    return QUEUE_LEAST + math.ceil(QUEUE_SHARE * running)


def sequences(
    *, kv_cache_tokens: int | None, tokens: RequestTokens | None, most: int = MOST_SEQUENCES
) -> Derived | None:
    """Return `max_num_seqs`; None, which keeps vLLM's default, if cache or requests are unknown.

        max_num_seqs = 1.25 x 0.95 x KV cache tokens / tokens that a running sequence holds

    rounded up to a multiple of 8, the step of CUDA graph captures (config/vllm.py,
    `cudagraph_capture_sizes`), from 8 to 1,024. vLLM's profiling run reserves memory for
    `max_num_seqs` sequences, so slots that are never used reduce the cache.
    """
    if kv_cache_tokens is None or tokens is None:
        return None
    fit = SLOTS_SHARE * sequences_held(kv_cache_tokens, tokens)
    value = max(FEWEST_SEQUENCES, min(most, 8 * math.ceil(fit / 8)))
    return Derived(
        name="max_num_seqs",
        value=value,
        why=(
            f"{SLOTS_SHARE} x {KV_SHARE} x {kv_cache_tokens:,} tokens of KV cache /"
            f" {_held(tokens)}, from {FEWEST_SEQUENCES} to {most:,}"
        ),
    )


def memory_share(
    free_and_total_bytes: Sequence[tuple[int, int]], *, needed_bytes: int | None
) -> Derived | None:
    """Return `gpu_memory_utilization`; None if the devices' memory is unknown.

        margin = max(1 GiB, 5 % of total)
        share  = min over devices of max(free - margin, min(free, needed)) / total, at most 0.95

    vLLM claims this share of the *total* memory, and does not start if less is free
    (v1/worker/utils.py, `request_memory`). The margin covers memory that vLLM does not account for:
    CUDA graphs, communication buffers, the driver. If the margin leaves less than the model needs,
    the need takes precedence, up to the free memory. The GPU gate has already judged whether the
    free memory suffices.

    Args:
        free_and_total_bytes: Memory of each device that the engine will use.
        needed_bytes: Need of each device, from `gpu.health`; None if unknown.
    """
    shares: list[tuple[float, int, int]] = []
    for free, total in free_and_total_bytes:
        margin = max(MEMORY_MARGIN_BYTES, MEMORY_MARGIN_SHARE * total)
        usable = max(free - margin, min(free, needed_bytes or 0))
        shares.append((usable / total, free, total))
    if not shares:
        return None
    share, free, total = min(shares)
    value = math.floor(100 * min(MOST_MEMORY_SHARE, share)) / 100
    if value <= 0:
        return None
    return Derived(
        name="gpu_memory_utilization",
        value=value,
        why=(
            f"({free / _GIB:.1f} GiB free - margin) / {total / _GIB:.1f} GiB,"
            f" at most {MOST_MEMORY_SHARE}"
        ),
    )


def cache_tokens(
    *, claimed_bytes: float, needed_bytes: int, least_tokens: int, bytes_per_token: int
) -> int | None:
    """Return the expected tokens of the KV cache; None if the model's shape is unknown.

        tokens = least + (claimed - needed) / bytes per token

    `needed` includes weights, workspace and a cache of `least` tokens (`gpu.health.needed_bytes`).
    """
    if not bytes_per_token:
        return None
    tokens = least_tokens + (claimed_bytes - needed_bytes) / bytes_per_token
    return max(least_tokens, math.floor(tokens))


def chunk_size(costs: Costs | None, tokens: RequestTokens | None, *, at_a_time: int) -> Derived:
    """Return the requests of a chunk, chosen so that one chunk is committed about every minute.

        seconds a request = cost of a request + prompt x cost + answer x (cost + step / at a time)
        chunk = 60 s / seconds a request, of two digits, from 50 to 5,000

    with the costs measured on this engine while busy (`estimates.costs`). If they are wrong by a
    factor of 2, a commit still comes every 30 to 120 s. Below 50 requests a chunk, Dagster's 15 ms
    per partition would be noticeable; above 5,000, a person would wait too long for a commit.
    """
    if costs is None or tokens is None:
        return Derived(
            name="chunk", value=DEFAULT_CHUNK, why="the default: the engine was never measured"
        )
    seconds = costs.seconds(
        work_shared(
            requests=1,
            prompt_tokens=tokens.prompt,
            completion_tokens=tokens.completion,
            at_a_time=at_a_time,
        )
    )
    exact = COMMIT_SECONDS / max(seconds, COMMIT_SECONDS / LARGEST_CHUNK / 10)
    value = max(SMALLEST_CHUNK, min(LARGEST_CHUNK, _two_digits(exact)))
    return Derived(
        name="chunk",
        value=value,
        why=(
            f"{COMMIT_SECONDS:g} s between commits / {seconds:.2g} s a request"
            f" ({tokens.prompt:,.0f} tokens of prompt, {tokens.completion:,.0f} of answer),"
            f" from {SMALLEST_CHUNK} to {LARGEST_CHUNK:,}"
        ),
    )


def _held(tokens: RequestTokens) -> str:
    return f"{tokens.held:,.0f} a request ({tokens.prompt:,.0f} + {tokens.completion:,.0f} / 2)"


def _two_digits(number: float) -> int:
    digits: int = 10 ** max(0, math.floor(math.log10(max(1.0, number))) - 1)
    return digits * round(number / digits)
