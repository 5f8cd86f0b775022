"""Reads vLLM's page of metrics: the few series that we go by, in Prometheus's text format."""

import re
from collections import defaultdict

from batch_orchestration.domain.engine_figures import EngineFigures

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


def read_figures(page: str) -> EngineFigures:
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
    return EngineFigures(
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
