"""What every engine must do: one set of tests, inherited by the tests of each engine."""

import asyncio
from typing import Any

import msgspec

from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Outcome
from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.metrics import EngineMetrics

CHAT = "/v1/chat/completions"
#: The engines under test are started with a context of this many tokens.
CONTEXT_TOKENS = 512


def chat(text: str, **fields: Any) -> bytes:
    """Return the body of a short chat request; `fields` are added to it."""
    messages = [{"role": "user", "content": text}]
    return msgspec.json.encode({"messages": messages, "max_tokens": 4, "temperature": 0, **fields})


def ask(engine: Engine, *bodies: bytes, endpoint: str = CHAT) -> list[Outcome]:
    """Submit the bodies all at once, in an event loop of their own; return their outcomes."""
    found = ask_and_catch(engine, *bodies, endpoint=endpoint)
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return [outcome for outcome in found if not isinstance(outcome, BaseException)]


def ask_and_catch(
    engine: Engine, *bodies: bytes, endpoint: str = CHAT
) -> list[Outcome | BaseException]:
    """As `ask`, but return exceptions as well."""

    async def submit() -> list[Outcome | BaseException]:
        try:
            calls = [
                engine.answer(endpoint, body, request_id=f"request-{index}")
                for index, body in enumerate(bodies)
            ]
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await engine.disconnect()

    return asyncio.run(submit())


def parse(outcome: Outcome) -> dict[str, Any]:
    """Return the body of an outcome that has one."""
    assert outcome.body is not None
    parsed: dict[str, Any] = msgspec.json.decode(outcome.body)
    return parsed


def metrics_of(engine: Engine) -> EngineMetrics:
    """Return what a living engine tells of its work, once it has caught up with its answers."""

    async def measure() -> EngineMetrics | None:
        try:
            await asyncio.sleep(0.1)  # vLLM counts a step after it has answered.
            return await engine.measure()
        finally:
            await engine.disconnect()

    figures = asyncio.run(measure())
    assert figures is not None
    return figures


class EngineContract:
    """Inherited together with a fixture `engine`: one that is started and serves a chat model."""

    def test_starting_a_started_engine_only_tells_who_it_is(self, engine: Engine) -> None:
        first = asyncio.run(engine.start())

        second = asyncio.run(engine.start())

        assert first == second
        assert first.models
        assert first.version != "unknown"

    def test_every_request_is_answered(self, engine: Engine) -> None:
        outcomes = ask(engine, *(chat(f"Say {number}.") for number in range(40)))

        assert len(outcomes) == 40
        assert all(isinstance(outcome, Completion) for outcome in outcomes)

    def test_an_answer_has_its_figures(self, engine: Engine) -> None:
        [outcome] = ask(engine, chat("Say something.", ignore_eos=True))

        assert isinstance(outcome, Completion)
        answer = parse(outcome)
        assert outcome.status == 200
        assert outcome.usage.prompt_tokens == answer["usage"]["prompt_tokens"] > 0
        assert outcome.usage.completion_tokens == answer["usage"]["completion_tokens"] == 4
        assert outcome.finish_reason == answer["choices"][0]["finish_reason"] == "length"
        assert outcome.request_id
        assert outcome.latency_seconds > 0

    def test_the_same_request_gets_the_same_answer(self, engine: Engine) -> None:
        [first] = ask(engine, chat("Say it again.", seed=1))
        [second] = ask(engine, chat("Say it again.", seed=1))

        assert parse(first)["choices"] == parse(second)["choices"]

    def test_a_refused_body_fails_for_good_with_the_engines_own_words(self, engine: Engine) -> None:
        [outcome] = ask(engine, chat("Hello.", temperature=-1))

        assert isinstance(outcome, Failure)
        assert (outcome.code, outcome.status) == (FailureCode.ENGINE_REFUSED, 400)
        assert not outcome.retryable
        assert "temperature must be non-negative" in outcome.message
        assert parse(outcome)["error"]["message"] == outcome.message

    def test_an_unknown_model_is_told_apart(self, engine: Engine) -> None:
        [outcome] = ask(engine, chat("Hello.", model="nobody"))

        assert isinstance(outcome, Failure)
        assert (outcome.code, outcome.status) == (FailureCode.MODEL_NOT_FOUND, 404)
        assert not outcome.retryable

    def test_a_prompt_longer_than_the_context_is_told_apart(self, engine: Engine) -> None:
        [outcome] = ask(engine, chat("word " * 2 * CONTEXT_TOKENS))

        assert isinstance(outcome, Failure)
        assert (outcome.code, outcome.status) == (FailureCode.CONTEXT_LENGTH_EXCEEDED, 400)

    def test_asking_for_more_tokens_than_the_context_is_told_apart(self, engine: Engine) -> None:
        [outcome] = ask(engine, chat("Hello.", max_tokens=1_000_000))

        assert isinstance(outcome, Failure)
        assert (outcome.code, outcome.status) == (FailureCode.CONTEXT_LENGTH_EXCEEDED, 400)

    def test_an_endpoint_that_the_engine_lacks_is_a_final_failure(self, engine: Engine) -> None:
        [outcome] = ask(engine, chat("Hello."), endpoint="/v1/nothing")

        assert isinstance(outcome, Failure)
        assert (outcome.code, outcome.status) == (FailureCode.ENGINE_REFUSED, 404)

    def test_a_body_that_is_not_json_is_a_final_failure(self, engine: Engine) -> None:
        [outcome] = ask(engine, b"{")

        assert isinstance(outcome, Failure)
        assert outcome.code == FailureCode.ENGINE_REFUSED

    def test_the_neighbours_of_refused_bodies_are_unharmed(self, engine: Engine) -> None:
        bodies = [chat(f"Say {number}.", temperature=-(number % 2)) for number in range(20)]

        outcomes = ask(engine, *bodies)

        answered = [isinstance(outcome, Completion) for outcome in outcomes]
        assert answered == [number % 2 == 0 for number in range(20)]

    def test_the_figures_count_what_was_asked(self, engine: Engine) -> None:
        before = metrics_of(engine)
        ask(engine, *(chat(f"Count {number}.", ignore_eos=True) for number in range(3)))

        after = metrics_of(engine)

        assert (after.running, after.waiting) == (0, 0)
        assert after.generation_tokens - before.generation_tokens == 3 * 4
        assert after.prompt_tokens > before.prompt_tokens
        assert after.tokens - before.tokens > 3 * 4
        assert after.kv_usage < 0.5
        assert after.kv_cache_tokens > CONTEXT_TOKENS
        assert after.preemptions == 0

    def test_a_cancelled_request_leaves_the_engine_ready(self, engine: Engine) -> None:
        async def cancel_one() -> None:
            body = chat("Count.", max_tokens=400, ignore_eos=True)
            call = asyncio.create_task(engine.answer(CHAT, body, request_id="cancelled"))
            await asyncio.sleep(0.05)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            await engine.disconnect()

        asyncio.run(cancel_one())

        [outcome] = ask(engine, chat("Still there?"))
        assert isinstance(outcome, Completion)
