"""The engine protocol: all that the services know of whatever answers requests."""

from typing import Any, Protocol

import msgspec

from batch_orchestration.core.outcomes import Outcome
from batch_orchestration.engines.figures import EngineMetrics
from batch_orchestration.engines.memory_ladder import MemoryFallback


class EngineIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What answers came from; stored with every result.

    Attributes:
        kind: `vllm`, `remote` or `simulated`.
        version: Of the software, for example `vllm 0.32.0`; `unknown` where it does not tell.
        models: Names that the engine answers to; the first is the default.
    """

    kind: str
    version: str
    models: tuple[str, ...]


class Engine(Protocol):
    """Whatever answers requests, many at a time.

    `start` and `stop` are called from any thread, `answer` within one event loop at a time.

    Attributes:
        ladder: Where the engine stands on its memory ladder; `start` starts it on that rung, and
            starts it anew if the rung's context is too short for the requests expected.
    """

    fallback: MemoryFallback

    async def start(self) -> EngineIdentity:
        """Make the engine ready; return who it is. Starting a started engine does nothing.

        After `EngineDied` it starts anew, whatever was left of the old one being ended first.

        Raises:
            EngineStartFailed: It did not become ready; the message has its last log lines.
            EngineRefusesUs: It is there, and does not let us in.
        """

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        """Submit one request and wait for what becomes of it.

        A request that goes wrong is a `Failure`, retryable or not; nothing is retried here.
        Cancelling the call lets the engine drop the request.

        Raises:
            EngineDied: The engine is gone; the request is unanswered and not to blame.
        """

    async def measure(self) -> EngineMetrics | None:
        """Return what the engine tells of its work now; None if it does not answer.

        What it does not tell is None. It is asked every second or so, and never raises.
        """

    async def disconnect(self) -> None:
        """Give back what belongs to the running event loop; the engine itself stays ready."""

    def stop(self) -> None:
        """End the engine and free its device memory. Stopping twice does nothing."""

    def figures(self) -> dict[str, Any]:
        """Return what is worth recording about the engine: pid, start-up seconds, log."""
