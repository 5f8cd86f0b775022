"""What a batch needs is estimated from above, or not at all."""

from typing import Any

import pytest

from batch_orchestration.core.batches import MemoryDemand
from batch_orchestration.core.requests import Request
from batch_orchestration.engines.memory_demand import TEMPLATE_TOKENS, memory_demand
from batch_orchestration_tests.support.builders import make_request

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
PICTURE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]


def request(endpoint: str = CHAT, **body: Any) -> Request:
    return make_request(body, endpoint=endpoint)


def answer_tokens(needs: MemoryDemand, *requests: Request) -> int | None:
    """The part of the need that is not prompt."""
    if needs.longest_tokens is None:
        return None
    return needs.longest_tokens - max(len(r.body) for r in requests) - TEMPLATE_TOKENS


@pytest.mark.parametrize(
    ("asked", "cap", "answer"),
    [
        (request(messages=HELLO, max_tokens=7), None, 7),
        (request(messages=PARTS, max_tokens=7), None, 7),
        (request(messages=HELLO, max_completion_tokens=9, max_tokens=7), None, 9),
        (request(messages=HELLO, max_tokens=7), 5, 5),
        (request(messages=HELLO), 5, 5),
        (request(messages=HELLO), None, None),
        (request(messages=HELLO, max_tokens="many"), None, None),
        (request(messages=PICTURE, max_tokens=7), None, None),
        (request(messages=HELLO, max_tokens=7, tools=[{"type": "function"}]), None, None),
        (request(messages=HELLO, max_tokens=7, tools=[]), None, 7),
        (request(COMPLETIONS, prompt="hello"), None, 16),
        (request(COMPLETIONS, prompt=[1, 2, 3], max_tokens=3), None, 3),
        (request(EMBEDDINGS, input="hello"), None, 0),
    ],
)
def test_the_longest_request(asked: Request, cap: int | None, answer: int | None) -> None:
    assert answer_tokens(memory_demand([asked], max_tokens_cap=cap), asked) == answer


def test_one_request_of_unknown_length_is_enough_to_cut_nothing() -> None:
    bounded, unbounded = request(messages=HELLO, max_tokens=7), request(messages=HELLO)

    assert memory_demand([bounded, unbounded, bounded], max_tokens_cap=None).longest_tokens is None


@pytest.mark.parametrize(
    ("asked", "can_be_cut"),
    [
        (request(messages=HELLO), True),
        (request(messages=PICTURE), False),
        (request(EMBEDDINGS, input="hello"), False),
    ],
)
def test_prompts_are_cut_where_text_makes_text(asked: Request, can_be_cut: bool) -> None:
    text = request(messages=HELLO, max_tokens=7)

    assert memory_demand([text, asked, text], max_tokens_cap=None).prompts_can_be_cut == can_be_cut
