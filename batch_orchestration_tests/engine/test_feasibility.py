"""Predictions against real vLLM: what is refused here, it refuses; what it accepts, is asked."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.admission.reading.screening import Feasibility, known_limits
from batch_orchestration.core.outcomes import Completion, FailureCode, Outcome
from batch_orchestration.core.requests import Overrides, Request
from batch_orchestration.engines.vllm.engine import VllmEngine
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration.estimates.prompt_counting import prompt_counter

pytest.importorskip("vllm")

from batch_orchestration_tests.support.builders import make_request

pytestmark = pytest.mark.engine

CONTEXT = 512
CHAT, COMPLETION, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
#: What the template adds to one message of a user: see `test_prompt_counting`.
AROUND = 19
#: As the shared engine has them (`conftest.py`).
ARGS = {"max-model-len": CONTEXT, "kv-cache-memory-bytes": 64 * 2**20}


def user(length: int, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x" * length}], **fields}


#: Name, endpoint, body, and whether it is so far above the limit that it must be predicted.
CASES: list[tuple[str, str, dict[str, Any], bool]] = [
    *(
        (f"chat prompt {CONTEXT + off:+d}", CHAT, user(CONTEXT + off - AROUND, max_tokens=1), False)
        for off in (-2, -1, 0, 1, 2)
    ),
    ("chat content far above", CHAT, user(CONTEXT + 40, max_tokens=1), True),
    ("chat answer at the limit", CHAT, user(5, max_tokens=CONTEXT, stop=["e"]), False),
    ("chat answer above the limit", CHAT, user(5, max_tokens=CONTEXT + 1), True),
    ("chat both fit, not together", CHAT, user(400, max_tokens=400, stop=["e"]), False),
    ("chat truncated", CHAT, user(5000, max_tokens=1, truncate_prompt_tokens=50), False),
    (
        "chat with a template of its own",
        CHAT,
        user(5000, max_tokens=1, chat_template="hello"),
        False,
    ),
    *(
        (
            f"completion prompt {off:+d}",
            COMPLETION,
            {"prompt": "x" * (CONTEXT + off), "max_tokens": 1},
            off > 9,
        )
        for off in (-2, -1, 0, 1, 40)
    ),
    *(
        (
            f"token ids {off:+d}",
            COMPLETION,
            {"prompt": [7] * (CONTEXT + off), "max_tokens": 1},
            off >= 0,
        )
        for off in (-1, 0, 1)
    ),
    ("two prompts, one too long", COMPLETION, {"prompt": ["x", "x" * 600], "max_tokens": 1}, True),
    ("another model", CHAT, user(5, max_tokens=1, model="other"), True),
    ("embeddings of a chat model", EMBEDDINGS, {"input": "hello"}, True),
]


def asked(endpoint: str, body: dict[str, Any]) -> Request:
    return make_request({"model": "tiny", **body}, endpoint=endpoint)


@pytest.fixture(scope="module")
def verdicts(vllm_engine: VllmEngine) -> dict[str, Outcome]:
    """What the engine says to each case."""
    engine = vllm_engine

    async def ask() -> dict[str, Outcome]:
        await engine.start()
        try:
            return {
                name: await engine.answer(
                    endpoint, bytes(asked(endpoint, body).body), request_id=name
                )
                for name, endpoint, body, _ in CASES
            }
        finally:
            await engine.disconnect()

    outcomes = asyncio.run(ask())
    assert engine.info.max_model_len == CONTEXT
    assert engine.info.kv_cache_tokens >= CONTEXT
    return outcomes


@pytest.mark.parametrize(
    ("name", "endpoint", "body", "predicted"), CASES, ids=[c[0] for c in CASES]
)
def test_nothing_is_refused_that_the_engine_accepts(
    tiny_model: Path,
    verdicts: dict[str, Outcome],
    name: str,
    endpoint: str,
    body: dict[str, Any],
    predicted: bool,
) -> None:
    engine = EngineInForce(
        kind="vllm",
        model=str(tiny_model),
        device="cpu",
        args=ARGS,
        folder=tiny_model,
        served=("tiny",),
    )
    feasibility = Feasibility(
        known_limits(engine, None, now=0.0),
        overrides=Overrides(),
        engine=engine,
        counter=prompt_counter(tiny_model),
    )

    fault = feasibility.fault_of(asked(endpoint, body))

    outcome = verdicts[name]
    if fault is not None:
        assert not isinstance(outcome, Completion), f"{name}: refused, though it is answered"
        # A model that has no embeddings has no page for them: 404 or 501, by version.
        assert outcome.code in (fault.code, FailureCode.ENGINE_REFUSED)
    if predicted:
        assert fault is not None, f"{name}: not predicted; the engine said {outcome}"
