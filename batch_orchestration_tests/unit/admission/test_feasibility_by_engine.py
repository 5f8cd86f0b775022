"""Requests judged by what is known of the engine, with the tiny model: one token a byte."""

from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.admission.reading.feasibility import CHAT, EMBEDDINGS, Limits, Runner
from batch_orchestration.admission.reading.screening import (
    COUNTED_ALL,
    REMOTE_FACTS_SECONDS,
    Feasibility,
    known_limits,
)
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import Fault, Overrides, Request
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration.estimates.prompt_counting import PromptCounter, prompt_counter
from batch_orchestration.estimates.tables import CachedEngineInfo
from batch_orchestration_tests.support.builders import NOW, make_request

pytest.importorskip("tokenizers")

from batch_orchestration_tests.support.tiny_model import make_tiny_model

CONTEXT = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_engine(model: Path | None = None, **fields: Any) -> EngineInForce:
    values = {
        "kind": "vllm",
        "model": str(model),
        "device": "cpu",
        "args": {"max-model-len": CONTEXT},
        "folder": model,
        "served": ("tiny",),
    }
    return EngineInForce(**{**values, **fields})


def make_facts(**fields: Any) -> CachedEngineInfo:
    values = {
        "models": ("tiny",),
        "max_model_len": 2048,
        "kv_cache_tokens": 4096,
        "start_seconds": 40.0,
        "seen_at": NOW,
    }
    return CachedEngineInfo(**{**values, **fields})


def chat(*messages: tuple[str, Any], **fields: Any) -> Request:
    turns = [{"role": role, "content": content} for role, content in messages]
    return asked(CHAT, {"messages": turns, **fields})


def asked(endpoint: str, body: dict[str, Any]) -> Request:
    return make_request({"model": "tiny", **body}, endpoint=endpoint, index=3)


def judge(
    request: Request, engine: EngineInForce, counter: PromptCounter | None = None
) -> Fault | None:
    return Feasibility(
        known_limits(engine, None, now=NOW),
        overrides=Overrides(),
        engine=engine,
        counter=counter or prompt_counter(engine.folder),
    ).fault_of(request)


def test_a_prompt_that_is_certainly_too_long_becomes_a_fault_of_its_line(model: Path) -> None:
    fault = judge(chat(("user", "x" * 300)), make_engine(model))

    assert fault is not None
    assert (fault.index, fault.line, fault.custom_id) == (3, 4, "request-3")
    assert fault.code is FailureCode.CONTEXT_LENGTH_EXCEEDED
    assert "256" in fault.message


def test_a_prompt_that_may_fit_is_asked(model: Path) -> None:
    assert judge(chat(("user", "x" * 250)), make_engine(model)) is None


def test_without_a_tokenizer_only_what_is_certain_is_refused(model: Path) -> None:
    engine = make_engine(model, folder=None)

    assert judge(chat(("user", "x" * 5000)), engine) is None
    assert judge(chat(("user", "x"), max_tokens=257), engine) is not None


def test_flags_that_change_the_prompt_keep_it_from_being_judged(model: Path) -> None:
    engine = make_engine(model, args={"max-model-len": CONTEXT, "chat-template": "other.jinja"})

    assert judge(chat(("user", "x" * 5000)), engine) is None


def test_what_an_earlier_answer_said_may_be_left_out_by_the_template(model: Path) -> None:
    assert judge(chat(("assistant", "x" * 5000), ("user", "hey")), make_engine(model)) is None


def test_a_template_that_cuts_what_it_renders_is_believed(model: Path, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "cutting")
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'][:10] }}")

    assert judge(chat(("user", "x" * 5000)), make_engine(folder)) is None


def test_token_ids_are_counted_without_a_tokenizer(model: Path) -> None:
    engine = make_engine(model, folder=None)

    assert judge(asked("/v1/completions", {"prompt": [1] * 255}), engine) is None
    assert judge(asked("/v1/completions", {"prompt": [1] * 256}), engine) is not None
    assert judge(asked("/v1/completions", {"prompt": [[1], [1] * 256]}), engine) is not None


def test_of_several_prompts_the_longest_decides(model: Path) -> None:
    engine = make_engine(model)

    assert judge(asked("/v1/completions", {"prompt": ["x" * 200] * 9}), engine) is None
    assert judge(asked("/v1/completions", {"prompt": ["x", "x" * 300]}), engine) is not None


def test_embeddings_of_a_chat_model_are_refused(model: Path) -> None:
    fault = judge(asked(EMBEDDINGS, {"input": "hello"}), make_engine(model))

    assert fault is not None
    assert fault.code is FailureCode.UNSUPPORTED_ENDPOINT


def test_prompts_that_are_far_from_the_limit_are_not_counted_for_ever(model: Path) -> None:
    counted: list[str] = []

    def encode(text: str, special: bool) -> int:
        counted.append(text)
        return len(text) // 8

    engine = make_engine(model)
    feasibility = Feasibility(
        known_limits(engine, None, now=NOW),
        overrides=Overrides(),
        engine=engine,
        counter=PromptCounter(encode, None),
    )
    for _ in range(3 * COUNTED_ALL):
        assert feasibility.fault_of(chat(("user", "x" * 400))) is None

    assert len(counted) < 3 * COUNTED_ALL
    # But one that may be too long by what was seen is.
    assert feasibility.fault_of(chat(("user", "x" * 4000))) is not None


def test_a_given_context_is_known_before_the_engine_ever_ran(model: Path) -> None:
    assert known_limits(make_engine(model), None, now=NOW) == Limits(
        served=("tiny",), max_model_len=CONTEXT, runner=Runner.GENERATE
    )


@pytest.mark.parametrize("value", ["auto", -1])
def test_a_context_that_memory_decides_is_not_known(model: Path, value: Any) -> None:
    engine = make_engine(model, args={"max-model-len": value})

    assert known_limits(engine, make_facts(), now=NOW).longest is None


def test_what_the_engine_said_is_believed_where_no_flag_says_it(model: Path) -> None:
    limits = known_limits(make_engine(model, args={}), make_facts(), now=NOW)

    assert (limits.max_model_len, limits.kv_cache_tokens, limits.longest) == (2048, 4096, 2048)


def test_a_cache_that_could_not_have_started_is_not_believed(model: Path) -> None:
    limits = known_limits(make_engine(model, args={}), make_facts(kv_cache_tokens=9), now=NOW)

    assert limits.longest == 2048


def test_other_names_are_only_refused_where_the_engine_looks_at_them(model: Path) -> None:
    engine = make_engine(model, served=None)

    assert known_limits(engine, None, now=NOW).served is None
    assert known_limits(engine, make_facts(models=("a",)), now=NOW).served == ("a",)
    lenient = make_engine(model, checks_names=False)
    assert known_limits(lenient, make_facts(), now=NOW).served is None


def test_a_remote_engine_is_believed_for_a_while() -> None:
    engine = EngineInForce(kind="remote", model="http://there", device="remote")
    facts = make_facts(models=("theirs",))

    assert known_limits(engine, facts, now=NOW + 60).served == ("theirs",)
    assert known_limits(engine, facts, now=NOW + REMOTE_FACTS_SECONDS) == Limits()
    assert known_limits(engine, None, now=NOW) == Limits()


def test_of_an_engine_that_nobody_knows_nothing_is_refused() -> None:
    engine = EngineInForce()

    assert judge(chat(("user", "x" * 10_000), max_tokens=10**9), engine) is None
