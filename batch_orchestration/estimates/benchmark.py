"""Calibration: measures the engine's costs with a few minutes of made-up prompts.

Rounds differ in prompt length, answer length and concurrency, so that the costs of each can be
separated.
"""

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from batch_orchestration.core.errors import CalibrationFailed
from batch_orchestration.core.outcomes import Completion, Failure, Outcome
from batch_orchestration.engines.base import Engine
from batch_orchestration.estimates.costs import Measurement, Source, Throughput, throughput
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration.workers.reporter import report_phase, report_progress

logger = logging.getLogger(__name__)

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
#: Tokens of a prompt and of an answer; shorter if the engine's context is small.
SHORT_PROMPT, LONG_PROMPT = 30, 300
SHORT_ANSWER, LONG_ANSWER = 4, 48
#: Concurrency between a single request and a full engine.
FEW = 8
#: Average of English text.
CHARACTERS_PER_TOKEN = 4
WORDS = (
    *("river", "window", "purple", "seven", "garden", "letter", "under", "market", "silver"),
    *("bridge", "yellow", "answer", "little", "morning", "paper", "station", "winter", "among"),
)


@dataclass(frozen=True, kw_only=True)
class Round:
    """A number of requests of equal length, sent with a fixed concurrency."""

    prompt_tokens: int
    answer_tokens: int
    at_a_time: int
    requests: int


@dataclass(frozen=True, kw_only=True)
class CalibrationReport:
    """The measurement of each round of a calibration, and the costs fitted to them."""

    rounds: tuple[Measurement, ...]
    throughput: Throughput | None
    failed: int


def rounds(*, requests: int, at_a_time: int, context_tokens: int | None) -> list[Round]:
    """Return the rounds of a calibration, the most informative first.

    Args:
        requests: Number of requests of a round that keeps the engine busy.
        at_a_time: Most requests that the engine computes together.
        context_tokens: Context length of the engine; None if unknown.
    """
    room = context_tokens or 8 * LONG_PROMPT
    long_prompt = max(SHORT_PROMPT, min(LONG_PROMPT, room // 8))
    long_answer = max(SHORT_ANSWER, min(LONG_ANSWER, room // 8))
    full = min(at_a_time, requests)
    few = min(FEW, full)
    plan = [
        (SHORT_PROMPT, SHORT_ANSWER, full, requests),
        (SHORT_PROMPT, long_answer, full, requests),
        (long_prompt, SHORT_ANSWER, full, requests),
        (SHORT_PROMPT, long_answer, 1, 1),
        (long_prompt, long_answer, few, few),
        (long_prompt, SHORT_ANSWER, 1, 2),
        (long_prompt, long_answer, full, requests),
        (SHORT_PROMPT, long_answer, few, few),
    ]
    return [
        Round(prompt_tokens=prompt, answer_tokens=answer, at_a_time=at_a_time, requests=count)
        for prompt, answer, at_a_time, count in plan
    ]


async def calibrate(
    engine: Engine,
    in_force: EngineInForce,
    *,
    requests: int,
    seconds: float,
    run_id: str,
) -> CalibrationReport:
    """Start the engine, measure it, and return the measurements with the fitted costs.

    Args:
        engine: The engine to measure; it is left running. Its first model answers.
        requests: Number of requests of a round that keeps the engine busy.
        seconds: Time limit, after which no further round begins.
        run_id: The run that calibrates.

    Raises:
        EngineError: The engine did not start, or died.
        CalibrationFailed: The engine answered no request.
    """
    info = await engine.start()
    report_phase("measuring the engine")
    try:
        client = _Client(engine, in_force, model=info.models[0], run_id=run_id)
        # Also a warm-up: an engine's first request pays one-time costs.
        await client.choose_endpoint()
        context = info.max_model_len
        began = time.monotonic()
        found: list[Measurement] = []
        for planned in rounds(
            requests=requests, at_a_time=in_force.at_a_time, context_tokens=context
        ):
            if found and time.monotonic() - began > seconds:
                break
            measured = await client.measure(planned)
            if measured is not None:
                found.append(measured)
                logger.info("%s took %.2f s", planned, measured.seconds)
    finally:
        await engine.disconnect()
    if not found:
        raise CalibrationFailed("the engine answered none of the made-up requests")
    return CalibrationReport(
        rounds=tuple(found), throughput=throughput(found), failed=client.failed
    )


class _Client:
    """Sends made-up requests with different first words, so that no prefix cache can help."""

    def __init__(self, engine: Engine, in_force: EngineInForce, *, model: str, run_id: str) -> None:
        self._engine = engine
        self._in_force = in_force
        self._model = model
        self._run_id = run_id
        self._dice = random.Random(run_id)
        self._endpoint = CHAT
        self._sent = 0
        self.failed = 0

    async def choose_endpoint(self) -> None:
        """Choose the first endpoint on which the model answers.

        Raises:
            CalibrationFailed: The model answers on no endpoint.
        """
        messages = []
        for self._endpoint in (CHAT, COMPLETION, EMBEDDING):
            outcome = await self._send(SHORT_PROMPT, SHORT_ANSWER)
            if isinstance(outcome, Completion):
                return
            messages.append(f"{self._endpoint}: {outcome.message}")
        raise CalibrationFailed("the engine answers on no endpoint: " + "; ".join(messages))

    async def measure(self, planned: Round) -> Measurement | None:
        """Send the requests of one round and return the measurement; None without an answer."""
        waiting = iter(range(planned.requests))
        outcomes: list[Outcome] = []
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(planned.at_a_time):
                group.create_task(self._work_off(waiting, planned, outcomes))
        took = time.monotonic() - began
        answers = [outcome for outcome in outcomes if isinstance(outcome, Completion)]
        self.failed += len(outcomes) - len(answers)
        if not answers:
            return None
        return Measurement(
            **self._in_force.key,
            run_id=self._run_id,
            memory_level=self._engine.fallback.description or "",
            source=Source.CALIBRATION,
            requests=len(answers),
            prompt_tokens=sum(answer.usage.prompt_tokens for answer in answers),
            completion_tokens=sum(answer.usage.completion_tokens for answer in answers),
            longest=max(answer.usage.completion_tokens for answer in answers),
            at_a_time=planned.at_a_time,
            seconds=took,
            measured_at=time.time(),
        )

    async def _work_off(
        self, waiting: Iterator[int], planned: Round, outcomes: list[Outcome]
    ) -> None:
        outcomes.extend(
            [await self._send(planned.prompt_tokens, planned.answer_tokens) for _ in waiting]
        )

    async def _send(self, prompt_tokens: int, answer_tokens: int) -> Completion | Failure:
        self._sent += 1
        body = self._body(self._text(prompt_tokens), answer_tokens)
        outcome = await self._engine.answer(
            self._endpoint, msgspec.json.encode(body), request_id=f"calibration-{self._sent}"
        )
        report_progress()
        return outcome

    def _text(self, tokens: int) -> str:
        words = [str(self._sent), *self._dice.choices(WORDS, k=tokens)]
        return " ".join(words)[: tokens * CHARACTERS_PER_TOKEN]

    def _body(self, text: str, answer_tokens: int) -> dict[str, Any]:
        if self._endpoint == EMBEDDING:
            return {"model": self._model, "input": text}
        # `ignore_eos` and `min_tokens` are vLLM's extensions that fix the length of answers.
        limits = {"max_tokens": answer_tokens, "ignore_eos": True, "min_tokens": answer_tokens}
        if self._endpoint == CHAT:
            messages = [{"role": "user", "content": text}]
            return {"model": self._model, "messages": messages, **limits}
        return {"model": self._model, "prompt": text, **limits}
