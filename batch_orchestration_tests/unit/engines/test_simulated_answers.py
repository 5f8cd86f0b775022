"""A simulated answer is a function of the body, and refused where vLLM would refuse it."""

from typing import Any

import pytest

from batch_orchestration.engines.simulated.answers import Faults, Refused, answer_body, read_faults

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MESSAGES = [{"role": "user", "content": "Hello there."}]


def answer(endpoint: str = CHAT, **body: Any) -> dict[str, Any]:
    if endpoint == CHAT:
        body = {"messages": MESSAGES, **body}
    return answer_body(endpoint, body, models=("one", "two"), context_tokens=100)


def test_the_same_body_gets_the_same_answer_and_another_body_another() -> None:
    assert answer(seed=1) == answer(seed=1)
    assert answer(seed=1)["id"] != answer(seed=2)["id"]


def test_faults_do_not_change_the_answer() -> None:
    assert answer(simulate={"status": 500, "fail_first": 1}) == answer()


def test_the_first_model_is_the_default() -> None:
    assert answer()["model"] == "one"
    assert answer(model="two")["model"] == "two"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_no_more_tokens_are_made_than_asked_for(field: str) -> None:
    made = answer(**{field: 2})

    assert made["usage"]["completion_tokens"] == 2
    assert made["choices"][0]["finish_reason"] == "length"


def test_an_answer_can_come_to_its_own_end() -> None:
    made = answer(max_tokens=50)

    assert made["usage"]["completion_tokens"] < 50
    assert made["choices"][0]["finish_reason"] == "stop"


def test_the_figures_add_up() -> None:
    usage = answer()["usage"]

    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_each_endpoint_answers_in_its_own_shape() -> None:
    assert answer()["choices"][0]["message"]["content"].startswith("[simulated] ")
    assert answer(COMPLETIONS, prompt="Hi")["choices"][0]["text"].startswith("[simulated] ")
    assert len(answer(EMBEDDINGS, input=["a", "b"])["data"]) == 2


def test_the_same_text_has_the_same_embedding() -> None:
    first, second, third = answer(EMBEDDINGS, input=["a", "a", "b"])["data"]

    assert first["embedding"] == second["embedding"] != third["embedding"]


@pytest.mark.parametrize(
    ("endpoint", "body", "status"),
    [
        (CHAT, {"model": "three"}, 404),
        (CHAT, {"messages": []}, 400),
        (CHAT, {"messages": "Hello."}, 400),
        (CHAT, {"messages": ["Hello."]}, 400),
        (CHAT, {"temperature": -1}, 400),
        (CHAT, {"max_tokens": 0}, 400),
        (CHAT, {"max_tokens": "many"}, 400),
        (CHAT, {"max_tokens": 101}, 400),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 100}]}, 400),
        (COMPLETIONS, {}, 400),
        (COMPLETIONS, {"prompt": ""}, 400),
        (EMBEDDINGS, {}, 400),
        (EMBEDDINGS, {"input": [1.5]}, 400),
        (EMBEDDINGS, {"input": []}, 400),
    ],
)
def test_what_vllm_would_refuse_is_refused(
    endpoint: str, body: dict[str, Any], status: int
) -> None:
    with pytest.raises(Refused) as caught:
        answer(endpoint, **body)

    assert caught.value.status == status


def test_content_may_be_a_list_of_parts_or_nothing() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    nothing = [{"role": "assistant", "content": None, "tool_calls": []}]

    assert answer(messages=parts)["usage"]["prompt_tokens"] > 0
    assert answer(messages=nothing)["usage"]["prompt_tokens"] > 0


def test_a_body_without_faults_has_none_and_a_misspelt_fault_is_refused() -> None:
    assert read_faults({}) == Faults()
    with pytest.raises(Refused, match="hangs"):
        read_faults({"simulate": {"hangs": True}})
