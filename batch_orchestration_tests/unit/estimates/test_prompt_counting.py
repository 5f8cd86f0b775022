"""Prompts are counted as the model's own files say, and not at all where they do not."""

from pathlib import Path

import pytest

from batch_orchestration.estimates.prompt_counting import PromptCounter, prompt_counter

pytest.importorskip("tokenizers")

from batch_orchestration_tests.support.tiny_model import make_tiny_model

CHAT = "/v1/chat/completions"


@pytest.fixture
def counter(tmp_path: Path) -> PromptCounter:
    found = prompt_counter(make_tiny_model(tmp_path / "tiny"))
    assert found is not None
    return found


def test_a_conversation_is_counted_with_its_template(counter: PromptCounter) -> None:
    """One token a byte: turn, role, line break, text, end, line break; then the answer's turn."""
    body = {"messages": [{"role": "user", "content": "hey"}]}

    assert counter.prompt_tokens(CHAT, body) == (1 + 5 + 3 + 1 + 1) + (1 + 10)


def test_content_in_parts_is_rendered_as_its_text(counter: PromptCounter) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "ey"}]

    assert counter.prompt_tokens(
        CHAT, {"messages": [{"role": "user", "content": parts}]}
    ) == counter.prompt_tokens(CHAT, {"messages": [{"role": "user", "content": "hey"}]})


def test_a_completion_is_counted_as_it_is(counter: PromptCounter) -> None:
    assert counter.prompt_tokens("/v1/completions", {"prompt": "abc"}) == 3
    assert counter.text_tokens("<|im_end|>é") == 3


def test_what_has_no_text_is_not_counted(counter: PromptCounter) -> None:
    assert counter.prompt_tokens("/v1/completions", {"prompt": [1, 2, 3]}) is None
    assert counter.prompt_tokens(CHAT, {"messages": "none"}) is None


def test_a_template_that_does_not_render_is_replaced_by_a_guess(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    counter = prompt_counter(folder)

    assert counter is not None
    assert counter.prompt_tokens(CHAT, {"messages": [{"role": "user", "content": "hey"}]}) == 10


def test_a_very_long_prompt_is_judged_by_its_beginning(counter: PromptCounter) -> None:
    assert counter.prompt_tokens("/v1/completions", {"prompt": "a" * 200_000}) == 200_000


def test_without_a_tokenizer_nothing_is_counted(tmp_path: Path) -> None:
    damaged = make_tiny_model(tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{}")

    assert prompt_counter(None) is None
    assert prompt_counter(tmp_path) is None
    assert prompt_counter(damaged) is None
