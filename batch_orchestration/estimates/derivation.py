"""How much is given to an engine, and in what portions: derived from what is known, with reasons.

Each figure has its formula in the docstring, and its derivation in words beside its value. None is
what nobody knows yet; then the default stays, and the words say so.
"""

import math
from collections.abc import Sequence

import msgspec

from batch_orchestration.estimates.costs import Costs, Work
from batch_orchestration.estimates.estimate import Estimate

#: Requests in flight where nothing is known: as many as vLLM computes together by default.
DEFAULT_IN_FLIGHT = 256
#: No window is wider: each request in flight is a connection, and a suspect when the engine dies.
MOST_IN_FLIGHT = 1024
#: Of the requests running, so many more should wait at the engine, so that a step never lacks one
#: while an answer travels back and the next request out.
QUEUE_SHARE, QUEUE_LEAST = 0.125, 2
#: Of a token, in tokens written, where nobody has measured it (as in `estimates.costs.GUESSED`);
#: and what is believed of measurements, which tell the two apart only roughly.
READING_COST, LEAST_READING_COST, MOST_READING_COST = 0.1, 0.02, 0.5
#: Of the KV cache: what the sequences of a batch hold together goes up and down by some per cent.
KV_SHARE = 0.95
#: Lengths differ: with so many more slots than fit on average, the cache binds and not the slots.
SLOTS_SHARE = 1.25
#: No fewer slots than the memory ladder's last rung, and no more than vLLM's largest default.
FEWEST_SEQUENCES, MOST_SEQUENCES = 8, 1024
#: More slots than vLLM's own default on a CPU, where a step's time grows with each sequence.
MOST_SEQUENCES_ON_CPU = 128
#: Of a device, whatever is free: CUDA graphs and NCCL's buffers are not in vLLM's own account.
MOST_MEMORY_SHARE = 0.95
MEMORY_MARGIN_BYTES, MEMORY_MARGIN_SHARE = 2**30, 0.05
#: Between two commits. Half as much is lost sight of, twice as much is slow to show.
COMMIT_SECONDS = 60.0
DEFAULT_CHUNK, SMALLEST_CHUNK, LARGEST_CHUNK = 1000, 50, 5000
_GIB = 2**30


class RequestTokens(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests of a batch hold of the KV cache, on average."""

    prompt: float
    completion: float

    @property
    def held(self) -> float:
        """Tokens of a running sequence: its prompt, and over its life half of its answer."""
        return max(1.0, self.prompt + self.completion / 2)


def request_tokens(estimates: Sequence[Estimate | None]) -> RequestTokens | None:
    """Return what a request of several batches has on average; None if none was estimated."""
    known = [each for each in estimates if each is not None and each.requests]
    requests = sum(each.requests for each in known)
    if not requests:
        return None
    return RequestTokens(
        prompt=sum(each.prompt_tokens.mid for each in known) / requests,
        completion=sum(each.completion_tokens.mid for each in known) / requests,
    )


class Derived(msgspec.Struct, frozen=True, kw_only=True):
    """A figure and how it came about; `window 384 = …` in the log."""

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
    """Return how many requests to give to an engine at first.

        running = min(max_num_seqs, 0.95 x KV cache tokens / tokens that a running sequence holds)
        window  = running + 2 + running / 8

    vLLM admits what it has slots and cache for (v1/core/sched/scheduler.py) and keeps the others
    waiting; with the surplus there is always one to admit. From then on `inference.window.control`
    follows what the engine tells.
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
        return Derived(name="window", value=value, why="the default, for nothing is known yet")
    running = max(1, math.floor(min(bounds)))
    queue = queued(running)
    why = f"{running:,} running ({'; or '.join(words)}) + {queue:,} waiting at the engine"
    if running + queue > most:
        why += f", at most {most:,}"
    return Derived(name="window", value=min(most, running + queue), why=why)


def sequences_held(kv_cache_tokens: int, tokens: RequestTokens) -> float:
    """Return how many running sequences a KV cache holds: 0.95 x its tokens / those of each."""
    return KV_SHARE * kv_cache_tokens / tokens.held


def reading_cost(costs: Costs | None, *, at_a_time: float) -> float:
    """Return what reading a token costs of what writing one does, by the costs measured.

        prompt / (answer + step / at a time), from 0.02 to 0.5

    By it the window weighs preempted sequences, which are read anew, against a wider batch.
    """
    if costs is None:
        return READING_COST
    writing = costs.completion_token + costs.step / max(1, at_a_time)
    if not writing:
        return READING_COST
    return max(LEAST_READING_COST, min(MOST_READING_COST, costs.prompt_token / writing))


def queued(running: float) -> int:
    """Return how many requests should wait at an engine that runs so many."""
    return QUEUE_LEAST + math.ceil(QUEUE_SHARE * running)


def sequences(
    *, kv_cache_tokens: int | None, tokens: RequestTokens | None, most: int = MOST_SEQUENCES
) -> Derived | None:
    """Return `max_num_seqs`; None, and vLLM's default stays, if cache or requests are not known.

        max_num_seqs = 1.25 x 0.95 x KV cache tokens / tokens that a running sequence holds

    in eights, as CUDA graphs are captured (config/vllm.py, `cudagraph_capture_sizes`), from 8 to
    1,024. vLLM's profiling run makes room for so many sequences, so that ones that never fit are
    paid for with cache.
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
    """Return `gpu_memory_utilization`; None if the devices' memory is not known.

        margin = max(1 GiB, 5 % of total)
        share  = min over devices of max(free - margin, needed) / total, at most 0.95

    vLLM claims this share of the *total*, and does not start if so much is not free
    (v1/worker/utils.py, `request_memory`). The margin is for what its own account leaves out: CUDA
    graphs, communication buffers, the driver. Where that leaves less than the model needs at all,
    the need wins, as far as it is free: whether that is enough the gate has judged.

    Args:
        free_and_total_bytes: Of each device that the engine will use.
        needed_bytes: Of each device, by `gpu.health`; None if not known.
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
    """Return what the KV cache will hold; None if the model's shape is not known.

        tokens = least + (claimed - needed) / bytes per token

    where `needed` has the weights, the workspace and a cache of `least` tokens
    (`gpu.health.needed_bytes`).
    """
    if not bytes_per_token:
        return None
    tokens = least_tokens + (claimed_bytes - needed_bytes) / bytes_per_token
    return max(least_tokens, math.floor(tokens))


def chunk_size(costs: Costs | None, tokens: RequestTokens | None, *, at_a_time: int) -> Derived:
    """Return how many requests a chunk has: so many that one is committed about every minute.

        seconds a request = cost of a request + prompt x cost + answer x (cost + step / at a time)
        chunk = 60 s / seconds a request, of two digits, from 50 to 5,000

    by the costs that were measured of this engine (`estimates.costs`), kept busy. They may be
    wrong by a factor of 2 and a commit still comes every 30 to 120 s. With 50 and fewer requests a
    chunk Dagster's 15 ms per partition would show; 5,000 is what a person still waits for.
    """
    if costs is None or tokens is None:
        return Derived(
            name="chunk", value=DEFAULT_CHUNK, why="the default, for this engine was never measured"
        )
    seconds = costs.seconds(
        Work(
            requests=1,
            prompt_tokens=tokens.prompt,
            completion_tokens=tokens.completion,
            steps=tokens.completion / max(1, at_a_time),
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
