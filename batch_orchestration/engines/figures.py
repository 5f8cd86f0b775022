"""What an engine tells of its own work at one moment. None is what it does not tell."""

import re
from collections import defaultdict

import msgspec


class EngineMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One look at an engine's metrics; of vLLM these are the series `vllm:*` of `/metrics`.

    Counters grow from the engine's start, and begin anew with a new engine.

    Attributes:
        running: Requests that are being computed.
        waiting: Requests that it has taken and does not compute yet.
        kv_usage: Share of the KV cache in use, 0 to 1.
        kv_cache_tokens: What the KV cache holds in all.
        preemptions: Counter of requests that were put back for want of KV cache.
        prompt_tokens: Counter of tokens read.
        generation_tokens: Counter of tokens written.
        prefix_queries: Counter of tokens looked up in the prefix cache.
        prefix_hits: Counter of those that were found there.
    """

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    kv_cache_tokens: int | None = None
    preemptions: int | None = None
    prompt_tokens: int | None = None
    generation_tokens: int | None = None
    prefix_queries: int | None = None
    prefix_hits: int | None = None

    @property
    def tokens(self) -> int | None:
        """Counter of all tokens: it moves with every step; None if the engine tells of none."""
        if self.prompt_tokens is None and self.generation_tokens is None:
            return None
        return (self.prompt_tokens or 0) + (self.generation_tokens or 0)


#: vLLM's gauge whose labels are the settings of its KV cache.
_CACHE_INFO = "vllm:cache_config_info"
#: Series of vLLM 0.32 (vllm/v1/metrics/loggers.py), by what we call them.
_COUNTS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prefix_cache_queries_total": "prefix_queries",
    "vllm:prefix_cache_hits_total": "prefix_hits",
}
_KV_USAGE = "vllm:kv_cache_usage_perc"
_LABEL = re.compile(r'(\w+)="([^"]*)"')
#: A larger number is none of these; whole numbers up to here are exact.
_MOST = 2**53
_DIGITS_OF_MOST = 15


def read_figures(page: str) -> EngineMetrics:
    """Return what the page tells; of a server that has none of vLLM's series, nothing but None.

    A server of several engines has a series of each: they are added up, and the share of the KV
    cache in use is their mean, as in vLLM's own log (`AggregatedLoggingStatLogger`).
    """
    found: dict[str, list[float]] = defaultdict(list)
    cache_tokens: list[int] = []
    for line in page.splitlines():
        if not line.startswith("vllm:"):
            continue
        name = line.partition("{")[0].partition(" ")[0]
        if name == _CACHE_INFO:
            cache_tokens += _cache_tokens(line)
        elif name in _COUNTS or name == _KV_USAGE:
            found[name] += _value(line)
    usage = found.get(_KV_USAGE)
    return EngineMetrics(
        kv_usage=min(1.0, sum(usage) / len(usage)) if usage else None,
        kv_cache_tokens=min(sum(cache_tokens), _MOST) or None,
        **{
            ours: min(round(sum(found[name])), _MOST)
            for name, ours in _COUNTS.items()
            if found.get(name)
        },
    )


def _value(line: str) -> list[float]:
    """Return the sample's value; nothing if that is no number, or none of anything."""
    try:
        value = float(line.rpartition(" ")[2])
    except ValueError:
        return []
    return [value] if 0 <= value <= _MOST else []


def _cache_tokens(line: str) -> list[int]:
    """Return what an engine's KV cache holds: its blocks times their size."""
    labels = dict(_LABEL.findall(line))
    blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    if not all(text.isdecimal() and len(text) <= _DIGITS_OF_MOST for text in (blocks, size)):
        return []
    return [int(blocks) * int(size)]
