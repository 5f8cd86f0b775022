"""Flat rows: what a table says of each kind of outcome."""

import base64
import json
import struct

import msgspec
import pytest

from batch_orchestration.core.outcomes import Usage
from batch_orchestration.delivery.exports import flat_outcome
from batch_orchestration_tests.support.builders import (
    MODEL,
    make_completion,
    make_failure,
    make_provenance,
    make_settled,
)


def answered(answer, **fields):
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return flat_outcome(make_settled(5, make_completion(body=msgspec.Raw(body), **fields)))


def test_an_answer_has_its_text_and_figures_and_no_code():
    usage = Usage(prompt_tokens=7, completion_tokens=3)

    row = flat_outcome(make_settled(5, make_completion("forty-two", usage=usage), attempts=2))

    assert (row.custom_id, row.index, row.line, row.status) == ("request-5", 5, 6, "completed")
    assert (row.text, row.finish_reason, row.embedding_length) == ("forty-two", "stop", None)
    assert (row.prompt_tokens, row.completion_tokens, row.attempts) == (7, 3, 2)
    assert (row.code, row.message, row.latency_seconds) == (None, None, 0.25)
    assert (row.engine, row.model, row.simulated) == ("simulated", MODEL, True)


def test_a_failure_has_its_code_and_no_tokens():
    row = flat_outcome(make_settled(5, make_failure(), custom_id=None))

    assert (row.status, row.code, row.message) == ("failed", "engine_refused", "the engine said no")
    assert (row.custom_id, row.text, row.prompt_tokens, row.completion_tokens) == (None,) * 4


def test_an_answer_of_a_real_engine_is_not_simulated():
    assert not flat_outcome(make_settled(provenance=make_provenance(engine="vllm"))).simulated


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"choices": [{"text": "plain completion"}]}, "plain completion"),
        ({"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}, "a"),
        ({"choices": [{"message": {"content": None, "tool_calls": [{}]}}]}, None),
        ({"choices": [{"message": {"content": ""}}]}, ""),
        ({"choices": []}, None),
        ({"choices": "odd"}, None),
        ([1, 2], None),
        (b"null", None),
    ],
)
def test_the_text_is_that_of_the_first_choice(answer, text):
    assert answered(answer).text == text


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        ({"choices": [{"text": "a"}]}, 1),
        ({"choices": [{"text": "a"}, {"text": "b"}, {"text": "c"}]}, 3),
        ({"data": [{"embedding": [1]}, {"embedding": [2]}]}, 2),
        ({"choices": "odd"}, None),
        ({}, None),
        (b"null", None),
    ],
)
def test_it_says_how_many_choices_there_are_besides_the_first(answer, choices):
    assert answered(answer).choices == choices


@pytest.mark.parametrize(
    ("embedding", "length"),
    [
        ([0.5, 1, 2], 3),
        (base64.b64encode(struct.pack("<4f", 1, 2, 3, 4)).decode(), 4),
        ("not base64!", None),
        (None, None),
    ],
)
def test_an_embedding_is_told_by_its_length(embedding, length):
    row = answered({"data": [{"embedding": embedding}]})

    assert (row.embedding_length, row.text) == (length, None)
