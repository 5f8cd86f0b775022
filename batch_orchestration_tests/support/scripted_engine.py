"""An engine within the test's process: answers at once, fails and dies on cue."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import EngineDied, EngineStartFailed
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Outcome, Usage
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.engines.memory_fallback import MemoryFallback, MemoryLevel
from batch_orchestration.engines.metrics import EngineMetrics

#: Given body and how often it was submitted before: an outcome, an exception, or None for "yes".
Script = Callable[[bytes, int], Outcome | BaseException | None]


def answer_to(body: bytes) -> Completion:
    """Return the one answer that this engine gives to a body."""
    asked = msgspec.json.encode(msgspec.json.decode(body))
    text = hashlib.sha256(asked).hexdigest()[:8]
    answer = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return Completion(
        status=200,
        body=msgspec.Raw(msgspec.json.encode(answer)),
        finish_reason="stop",
        usage=Usage(prompt_tokens=3, completion_tokens=2),
    )


class ScriptedEngine:
    """Counts what it is asked; `script` decides what becomes of each submission."""

    def __init__(
        self,
        script: Script = lambda body, times: None,
        *,
        starts_fail: int = 0,
        fallback: MemoryFallback | None = None,
    ) -> None:
        self.name = "the engine"
        #: None even after `start`: it has no facts worth a place in the store.
        self.info: EngineInfo | None = None
        self.fallback = fallback or MemoryFallback(MemoryLevel())
        self._script = script
        self._starts_fail = starts_fail
        self._life = 0
        self.alive = False
        self.starts = 0
        self.submissions: Counter[bytes] = Counter()
        self.in_flight = 0
        self.most_in_flight = 0

    async def start(self) -> EngineInfo:
        if not self.alive:
            self.starts += 1
            if self.starts <= self._starts_fail:
                raise EngineStartFailed("scripted: does not become ready")
            self.alive = True
            self._life += 1
        return EngineInfo(kind="scripted", version="1", models=("tiny",))

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        life = self._life
        times = self.submissions[body]
        self.submissions[body] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            result = self._script(body, times)
            if isinstance(result, EngineDied):
                self.alive = False
            if not self.alive or life != self._life:
                raise EngineDied("scripted: the engine is gone")
            if isinstance(result, BaseException):
                raise result
            return result or answer_to(body)
        finally:
            self.in_flight -= 1

    async def measure(self) -> EngineMetrics | None:
        return EngineMetrics() if self.alive else None

    async def disconnect(self) -> None:
        pass

    def stop(self) -> None:
        self.alive = False


class PacedEngine(ScriptedEngine):
    """Takes some time for each request, and records the order of the requests.

    Args:
        seconds: For each request.
    """

    def __init__(self, *arguments: Any, seconds: float = 0.004, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._seconds = seconds
        self.asked: list[str] = []

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        self.asked.append(request_id)
        await asyncio.sleep(self._seconds)
        return await super().answer(endpoint, body, request_id=request_id)

    def places_of(self, plan: BatchPlan) -> list[int]:
        """Return the places of a batch's requests in the order of all requests."""
        return [n for n, asked in enumerate(self.asked) if asked.startswith(plan.batch_id)]


def batches_of(asked: Sequence[str]) -> list[str]:
    """Return the ids of the batches as they follow each other, without repetitions."""
    ids = [request_id.rsplit("-", 2)[0] for request_id in asked]
    return [one for n, one in enumerate(ids) if n == 0 or ids[n - 1] != one]


class StickingEngine(ScriptedEngine):
    """Answers so many requests at once, and never the others."""

    def __init__(self, answers: int, **fields: Any) -> None:
        super().__init__(**fields)
        self._answers = answers
        self.aborted = 0
        self.stuck = 0

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        self._answers -= 1
        if self._answers >= 0:
            return await super().answer(endpoint, body, request_id=request_id)
        self.submissions[body] += 1
        self.stuck += 1
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        raise AssertionError("nobody waits for an hour")


#: The answer to each request of a batch with one wrong parameter.
REFUSAL = Failure(
    code=FailureCode.ENGINE_REFUSED, message="unknown parameter: 'tempreature'", status=400
)


def refusal_of(body: bytes, *texts: str) -> Outcome | None:
    """Return the refusal of a body that contains one of the texts."""
    return REFUSAL if any(text.encode() in body for text in texts) else None


def refusing(*texts: str) -> ScriptedEngine:
    """Return an engine that refuses each request that contains one of the texts."""
    return ScriptedEngine(lambda body, times: refusal_of(body, *texts))
