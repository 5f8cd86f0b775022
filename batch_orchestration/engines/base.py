"""The engine protocol, through which all other code uses an engine."""

from typing import Protocol

import msgspec

from batch_orchestration.core.outcomes import Outcome
from batch_orchestration.engines.memory_fallback import MemoryFallback
from batch_orchestration.engines.metrics import EngineMetrics


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A started engine, as reported by its server; None marks what it does not report.

    Attributes:
        kind: `vllm`, `remote` or `simulated`.
        version: Software version, for example `vllm 0.32.0`; `unknown` if it is not reported.
        models: Names of the served models; the first is the default.
        max_model_len: Most tokens of prompt and answer together.
        kv_cache_tokens: Capacity of the KV cache.
        max_num_seqs: Most requests computed at a time; None for a server not started here.
        start_seconds: Time until the engine was ready.
    """

    kind: str
    version: str
    models: tuple[str, ...]
    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    max_num_seqs: int | None = None
    start_seconds: float | None = None


class Engine(Protocol):
    """An inference engine that answers many requests at a time.

    `start` and `stop` may be called from any thread, `answer` within one event loop at a time.

    Attributes:
        name: The engine in messages: its address, or `the vllm engine`.
        info: Result of the latest `start`, also after `stop`; None before the first.
        fallback: Determines the memory level at which `start` starts the engine. If that level's
            context is too short for the expected requests, `start` restarts the engine.
    """

    name: str
    info: EngineInfo | None
    fallback: MemoryFallback

    async def start(self) -> EngineInfo:
        """Make the engine ready and return its description. Idempotent.

        After `EngineDied`, remains of the dead engine are ended and the engine is started again.

        Raises:
            EngineStartFailed: It did not become ready; the message has its last log lines.
            EngineRefusesUs: The engine is reachable, but refuses access.
        """

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        """Submit one request and wait for its outcome.

        A request that goes wrong is a `Failure`, retryable or not; nothing is retried here.
        Cancelling the call lets the engine drop the request.

        Raises:
            EngineDied: The engine is gone; the request is unanswered and not to blame.
        """

    async def measure(self) -> EngineMetrics | None:
        """Return the engine's current metrics; None if it does not answer.

        Metrics that the engine does not report are None. Called about once a second; never raises.
        """

    async def disconnect(self) -> None:
        """Release the resources of the running event loop; the engine itself stays ready."""

    def stop(self) -> None:
        """End the engine and free its device memory. Idempotent."""

    def release(self) -> None:
        """End this run's use of the engine, which may stay warm for others. Idempotent."""
