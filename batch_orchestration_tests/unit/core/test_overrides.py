"""What is changed in a body on its way to the engine."""

import json

import pytest

from batch_orchestration.core.requests import Overrides, override_line, prepare_body, resolve_model
from batch_orchestration_tests.support.builders import make_request

SERVED = ("smollm2", "smollm2-lora")


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("gpt-4o", Overrides(), "gpt-4o"),
        (None, Overrides(), None),
        ("gpt-4o", Overrides(aliases={"gpt-4o": "smollm2"}), "smollm2"),
        ("gpt-4o", Overrides(aliases={"*": "smollm2"}), "smollm2"),
        (None, Overrides(aliases={"*": "smollm2"}), "smollm2"),
        ("smollm2-lora", Overrides(aliases={"*": "smollm2"}), "smollm2-lora"),
        ("gpt-4o", Overrides(aliases={"*": "a", "gpt-4o": "b"}), "b"),
        ("gpt-4o", Overrides(model="smollm2-lora", aliases={"*": "smollm2"}), "smollm2-lora"),
    ],
)
def test_the_batch_decides_on_the_model_then_an_alias_then_the_body(
    name: str | None, overrides: Overrides, expected: str | None
) -> None:
    assert resolve_model(name, overrides=overrides, served=SERVED) == expected


def test_a_body_without_overrides_passes_byte_for_byte() -> None:
    body = b'{ "model":"smollm2",  "temperature":0.10, "seed":1e3 }'

    assert prepare_body(make_request(body), overrides=Overrides(), served=SERVED) == body


def test_an_alias_changes_the_model_and_keeps_the_bytes_of_all_else() -> None:
    body = '{"model":"gpt-4o","temperature":0.10,"x":{"ü": [1, 2]},"seed":1e3}'.encode()

    sent = prepare_body(
        make_request(body), overrides=Overrides(aliases={"*": "smollm2"}), served=SERVED
    )

    assert sent == '{"model":"smollm2","temperature":0.10,"x":{"ü": [1, 2]},"seed":1e3}'.encode()


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, {"max_tokens": 8}),
        ({"max_tokens": None}, {"max_tokens": 8}),
        ({"max_tokens": 4}, {"max_tokens": 4}),
        ({"max_tokens": 100}, {"max_tokens": 8}),
        ({"max_completion_tokens": 100}, {"max_completion_tokens": 8}),
        (
            {"max_tokens": 2, "max_completion_tokens": 100},
            {"max_tokens": 2, "max_completion_tokens": 8},
        ),
        ({"max_tokens": -1}, {"max_tokens": -1}),
        ({"max_tokens": "many"}, {"max_tokens": "many"}),
        ({"max_tokens": 100.0}, {"max_tokens": 8}),
        ({"max_tokens": 1e30}, {"max_tokens": 8}),
        ({"max_tokens": " 1_00 "}, {"max_tokens": 8}),
        ({"max_completion_tokens": "+100.0"}, {"max_completion_tokens": 8}),
        ({"max_tokens": "4"}, {"max_tokens": "4"}),
        ({"max_tokens": 100.5}, {"max_tokens": 100.5}),
        ({"max_tokens": True}, {"max_tokens": True}),
    ],
)
def test_a_cap_bounds_what_a_request_may_ask_for(limits: dict, expected: dict) -> None:
    body = json.dumps({"model": "smollm2"} | limits).encode()

    sent = prepare_body(make_request(body), overrides=Overrides(max_tokens_cap=8), served=SERVED)

    assert json.loads(sent) == {"model": "smollm2"} | expected


def test_embeddings_have_no_token_limit_to_cap() -> None:
    body = b'{"model":"smollm2","input":"cat"}'

    sent = prepare_body(
        make_request(body, endpoint="/v1/embeddings"),
        overrides=Overrides(max_tokens_cap=8),
        served=SERVED,
    )

    assert sent == body


# --- a whole line ---------------------------------------------------------------------------------

LINE = (
    b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",'
    b' "body": {"model": "m", "temperature": 1.0, "max_tokens": 5}}'
)


def changed(line: bytes, **fields: object) -> dict:
    return json.loads(override_line(line, fields))["body"]


def test_a_line_without_overrides_keeps_its_bytes() -> None:
    assert override_line(LINE, {}) is LINE


def test_fields_of_the_body_are_replaced_added_and_removed() -> None:
    body = changed(LINE, max_tokens=9, top_p=0.5, temperature=None)

    assert body == {"model": "m", "max_tokens": 9, "top_p": 0.5}


def test_a_new_token_limit_takes_the_place_of_the_one_that_is_there() -> None:
    line = LINE.replace(b"max_tokens", b"max_completion_tokens")

    assert "max_tokens" not in changed(line, max_tokens=9)
    assert changed(line, max_tokens=9)["max_completion_tokens"] == 9


def test_untouched_fields_keep_their_bytes() -> None:
    assert b'"temperature":1.0' in override_line(LINE, {"max_tokens": 9})
    assert override_line(LINE, {"max_tokens": 9}).startswith(b'{"custom_id":"a","method":"POST"')


@pytest.mark.parametrize("line", [b"{torn", b"[1]", b'{"body": 7}', b'{"custom_id": "a"}', b"\xff"])
def test_a_line_without_a_body_stays_as_it_is(line: bytes) -> None:
    assert override_line(line, {"max_tokens": 9}) == line
