"""What an engine tells of its own work at one moment. None is what it does not tell."""

import msgspec


class EngineFigures(msgspec.Struct, frozen=True, kw_only=True):
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
