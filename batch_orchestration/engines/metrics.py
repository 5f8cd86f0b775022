"""Metrics that an engine reports about its work. None means not reported."""

import re
from collections import defaultdict

import msgspec


class EngineMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of an engine's metrics; for vLLM, of the series `vllm:*` of `/metrics`.

    Counters grow from the engine's start; a new engine starts again from 0.

    Attributes:
        running: Requests being computed.
        waiting: Requests accepted but not yet computed.
        kv_usage: Share of the KV cache in use, 0 to 1.
        kv_cache_tokens: Capacity of the KV cache.
        preemptions: Counter of requests preempted for lack of KV cache.
        prompt_tokens: Counter of prompt tokens processed.
        generation_tokens: Counter of tokens generated.
        prefix_queries: Counter of tokens looked up in the prefix cache.
        prefix_hits: Counter of tokens found there.
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
        """Counter of all tokens, which grows with every step; None if none is reported."""
        if self.prompt_tokens is None and self.generation_tokens is None:
            return None
        return (self.prompt_tokens or 0) + (self.generation_tokens or 0)


#: vLLM's gauge whose labels are the settings of its KV cache.
_CACHE_INFO = "vllm:cache_config_info"
#: Series of vLLM 0.32 (vllm/v1/metrics/loggers.py) and the fields that they fill.
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
#: Larger values are ignored; whole numbers up to here are exact.
_MOST = 2**53
_DIGITS_OF_MOST = 15


def parse_metrics(page: str) -> EngineMetrics:
    """Return the metrics on a page; all None if it has none of vLLM's series.

    A server of several engines has a series for each. Their values are added up; only for the
    share of the KV cache in use, the mean is taken, as in vLLM's own log
    (`AggregatedLoggingStatLogger`).
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
    """Return the sample's value; nothing if it is not a number or out of range."""
    try:
        value = float(line.rpartition(" ")[2])
    except ValueError:
        return []
    return [value] if 0 <= value <= _MOST else []


def _cache_tokens(line: str) -> list[int]:
    """Return the capacity of an engine's KV cache: number of blocks times block size."""
    labels = dict(_LABEL.findall(line))
    blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
    if not all(text.isdecimal() and len(text) <= _DIGITS_OF_MOST for text in (blocks, size)):
        return []
    return [int(blocks) * int(size)]
