"""What is certain to be refused, and above all what is not."""

from typing import Any

import pytest

from batch_orchestration.admission.reading.feasibility import (
    CHAT,
    EMBEDDINGS,
    Infeasible,
    Limits,
    Runner,
    infeasible,
    least_tokens,
    runner_of,
)
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import Overrides

CONTEXT = 100
TOO_LONG = FailureCode.CONTEXT_LENGTH_EXCEEDED


def judged(
    body: dict[str, Any] | None = None,
    *,
    endpoint: str = CHAT,
    prompt: int | None = None,
    overrides: Overrides | None = None,
    **limits: Any,
) -> Infeasible | None:
    return infeasible(
        endpoint,
        {"model": "m", **(body or {})},
        limits=Limits(**{"max_model_len": CONTEXT, **limits}),
        overrides=overrides or Overrides(),
        least_prompt_tokens=lambda: prompt,
    )


@pytest.mark.parametrize(
    ("prompt", "refused"), [(None, False), (98, False), (99, False), (100, True), (5000, True)]
)
def test_a_prompt_must_leave_room_for_one_token(prompt: int | None, refused: bool) -> None:
    found = judged(prompt=prompt)

    assert (found is not None) == refused
    if found is not None:
        assert found[0] is TOO_LONG
        assert f"at least {prompt:,} tokens" in found[1]


def test_a_prompt_that_is_only_embedded_needs_no_room() -> None:
    assert judged(endpoint=EMBEDDINGS, prompt=100) is None
    assert judged(endpoint=EMBEDDINGS, prompt=101) is not None


@pytest.mark.parametrize(
    ("body", "refused"),
    [
        ({"max_tokens": 100}, False),
        ({"max_tokens": 101}, True),
        ({"max_completion_tokens": 101}, True),
        # vLLM reads the second; either may be the one that counts.
        ({"max_tokens": 101, "max_completion_tokens": 5}, False),
        ({"max_tokens": "many"}, False),
        ({"max_tokens": None}, False),
    ],
)
def test_an_answer_longer_than_the_context_is_refused(body: dict[str, Any], refused: bool) -> None:
    assert (judged(body) is not None) == refused


def test_prompt_and_answer_that_fit_by_themselves_are_asked() -> None:
    """VLLM shortens the answer to what is left."""
    assert judged({"max_tokens": 90}, prompt=90) is None


def test_the_cap_of_the_deployment_makes_a_request_feasible() -> None:
    assert judged({"max_tokens": 5000}, overrides=Overrides(max_tokens_cap=10)) is None


@pytest.mark.parametrize("field", ["truncate_prompt_tokens", "chat_template", "prompt_embeds"])
def test_what_changes_the_prompt_on_its_way_is_not_judged(field: str) -> None:
    assert judged({field: 5}, prompt=5000) is None


def test_the_smaller_of_context_and_cache_counts() -> None:
    assert judged(prompt=60, kv_cache_tokens=50) is not None
    assert judged(prompt=60, kv_cache_tokens=500) is None
    assert judged(prompt=5000, max_model_len=None) is None


def test_a_model_that_is_not_served_is_named_beside_those_that_are() -> None:
    found = judged({"model": "gpt-4"}, served=("ours", "adapter"))

    assert found is not None
    assert found[0] is FailureCode.MODEL_NOT_FOUND
    assert "'gpt-4'" in found[1]
    assert "ours, adapter" in found[1]


@pytest.mark.parametrize(
    ("body", "overrides"),
    [
        ({"model": "ours"}, Overrides()),
        ({"model": "gpt-4"}, Overrides(aliases={"*": "ours"})),
        ({"model": "gpt-4"}, Overrides(aliases={"gpt-4": "ours"})),
        ({"model": "gpt-4"}, Overrides(model="ours")),
        ({"model": None}, Overrides()),
    ],
)
def test_a_model_that_is_served_by_whatever_name_is_asked(
    body: dict[str, Any], overrides: Overrides
) -> None:
    assert judged(body, overrides=overrides, served=("ours",)) is None


def test_each_kind_of_model_answers_on_its_own_endpoints() -> None:
    chat = judged(endpoint=EMBEDDINGS, runner=Runner.GENERATE)
    embedding = judged(runner=Runner.POOLING)

    assert chat is not None
    assert embedding is not None
    assert chat[0] is embedding[0] is FailureCode.UNSUPPORTED_ENDPOINT
    assert judged(runner=Runner.GENERATE) is None
    assert judged(endpoint=EMBEDDINGS, runner=Runner.POOLING) is None


@pytest.mark.parametrize(
    ("architecture", "args", "pools", "runner"),
    [
        ("LlamaForCausalLM", {}, False, Runner.GENERATE),
        ("LlamaForCausalLM", {}, True, None),
        ("LlamaForCausalLM", {"runner": "pooling"}, False, Runner.POOLING),
        ("LlamaForCausalLM", {"runner": "auto"}, False, Runner.GENERATE),
        ("LlamaForCausalLM", {"convert": "embed"}, False, None),
        ("BertModel", {}, True, Runner.POOLING),
        ("ChatGLMModel", {}, False, None),
        ("Qwen2VLForConditionalGeneration", {}, False, None),
    ],
)
def test_what_a_model_is_for_is_only_said_where_it_is_certain(
    architecture: str, args: dict[str, Any], pools: bool, runner: Runner | None
) -> None:
    assert runner_of({"architectures": [architecture]}, args, pools=pools) is runner


def test_a_model_without_one_architecture_is_not_judged() -> None:
    assert runner_of({}, {}, pools=False) is None
    assert runner_of({"architectures": ["A", "B"]}, {}, pools=False) is None


def test_a_lower_bound_gives_a_little_away() -> None:
    assert least_tokens([]) == 0
    assert least_tokens([1]) == 0
    assert least_tokens([1000, 1000]) == 1976
