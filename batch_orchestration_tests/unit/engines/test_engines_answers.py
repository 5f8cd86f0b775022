"""Every HTTP answer that a server may give means exactly one outcome."""

import json
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from batch_orchestration.core.foreign_json import MAX_DEPTH
from batch_orchestration.core.outcomes import (
    LARGEST_COUNT,
    LONGEST_WORD,
    Completion,
    Failure,
    FailureCode,
    Usage,
)
from batch_orchestration.engines.answers import ABORTED, read_answer
from batch_orchestration.files.journal_records import OutcomeRecord, encode_record
from batch_orchestration_tests.support.builders import ENDPOINT

CHAT = b'{"id": "chatcmpl-1", "choices": [{"index": 0, "finish_reason": "stop"}, {}], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}'  # noqa: E501


def completion(body: bytes, **headers: str) -> Completion:
    outcome = read_answer(ENDPOINT, 200, CIMultiDict(headers), body, 0.5)
    assert isinstance(outcome, Completion)
    return outcome


def failure(status: int, body: bytes = b"", **headers: str) -> Failure:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    outcome = read_answer(ENDPOINT, status, CIMultiDict(named), body, 0.5)
    assert isinstance(outcome, Failure)
    return outcome


def openai_error(message: str, code: str | int | None = None) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return msgspec.json.encode({"error": error})


def test_an_answer_is_kept_byte_for_byte_and_its_figures_are_read() -> None:
    outcome = completion(CHAT)

    assert bytes(outcome.body) == CHAT
    assert outcome.usage == Usage(prompt_tokens=7, completion_tokens=3)
    assert outcome.finish_reason == "stop"
    assert outcome.latency_seconds == 0.5


def test_the_request_id_of_the_header_comes_before_that_of_the_body() -> None:
    assert completion(CHAT).request_id == "chatcmpl-1"
    assert completion(CHAT, **{"X-Request-ID": "r-9"}).request_id == "r-9"


@pytest.mark.parametrize(
    "fields",
    [
        b"",
        b', "usage": null, "id": null',
        b', "usage": {"prompt_tokens": null}, "error": null',
        b', "usage": "much", "id": 5, "error": ""',
        b', "usage": {"prompt_tokens": 12.0, "completion_tokens": "7"}',
        b', "usage": [true], "id": ["x"], "error": {}',
        b', "usage": {"prompt_tokens": true, "completion_tokens": 1e3}',
    ],
)
def test_an_answer_without_the_usual_fields_is_an_answer_all_the_same(fields: bytes) -> None:
    body = b'{"choices": [{"finish_reason": 3}]%s}' % fields

    outcome = completion(body)

    assert bytes(outcome.body) == body
    assert outcome.usage == Usage()
    assert (outcome.finish_reason, outcome.request_id) == (None, None)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("2147483647", LARGEST_COUNT),
        ("2147483648", LARGEST_COUNT),
        (f"{2**63}", LARGEST_COUNT),
        (f"{10**30}", LARGEST_COUNT),
        ("9" * 4000, LARGEST_COUNT),
        ("-1", 0),
        (f"-{10**30}", 0),
        ("1e999", 0),
    ],
)
def test_counts_of_tokens_are_brought_into_range(said: str, kept: int) -> None:
    usage = f'{{"prompt_tokens": {said}, "completion_tokens": {said}}}'

    outcome = completion(f'{{"choices": [{{}}], "usage": {usage}}}'.encode())

    assert outcome.usage == Usage(prompt_tokens=kept, completion_tokens=kept)


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ("caf\udce9", "caf\N{REPLACEMENT CHARACTER}"),
        ("\ud83d", "\N{REPLACEMENT CHARACTER}"),
        ("a\x00\x1b[2J", "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[2J"),
        ("x" * 10_000, "x" * LONGEST_WORD),
    ],
)
def test_the_text_of_a_header_is_made_storable(header: str, kept: str) -> None:
    outcome = completion(CHAT, **{"X-Request-ID": header})
    failed = failure(500, b"no", **{"X-Request-ID": header})

    assert outcome.request_id == failed.request_id == kept
    assert stored(outcome)
    assert stored(failed)


def stored(outcome: Completion | Failure) -> bytes:
    record = OutcomeRecord(ordinal=1, index=0, line=1, attempt=1, at=0.0, outcome=outcome)
    return encode_record(record)


@pytest.mark.parametrize("depth", [MAX_DEPTH, 1_000, 100_000])
@pytest.mark.parametrize("status", [200, 400, 500])
def test_an_answer_that_is_nested_too_deeply_is_unreadable(status: int, depth: int) -> None:
    body = b'{"choices": [{"x": %s%s}]}' % (b"[" * depth, b"]" * depth)

    outcome = failure(status, body)

    assert (outcome.code == FailureCode.RESPONSE_UNREADABLE) == (status == 200)
    assert outcome.body is None


@pytest.mark.parametrize(
    ("endpoint", "body", "is_answer"),
    [
        (ENDPOINT, b"{}", False),
        (ENDPOINT, b'{"choices": null}', False),
        (ENDPOINT, b'{"choices": []}', False),
        (ENDPOINT, b'{"choices": [ ]}', False),
        (ENDPOINT, b'{"choices": {"0": {}}}', False),
        (ENDPOINT, b'{"choices": "stop"}', False),
        (ENDPOINT, b'{"choices": [null]}', False),
        (ENDPOINT, b'{"data": [{"embedding": [1]}]}', False),
        (ENDPOINT, b'{"login": "please"}', False),
        (ENDPOINT, b'{"choices": [{}]}', True),
        ("/v1/completions", b'{"choices": [{"text": ""}]}', True),
        ("/v1/embeddings", b'{"data": [{"embedding": [1]}]}', True),
        ("/v1/embeddings", b'{"data": []}', False),
        ("/v1/embeddings", b'{"choices": [{}]}', False),
        ("/v1/score", b'{"data": [{"score": 1}]}', True),
        ("/v1/rerank", b'{"results": [{"index": 0}]}', True),
        ("/v1/responses", b'{"output": [{"type": "message"}], "error": null}', True),
        ("/v1/of-the-future", b'{"data": [{}]}', True),
        ("/v1/of-the-future", b'{"object": "list"}', False),
    ],
)
def test_an_answer_has_what_its_endpoint_is_asked_for(
    endpoint: str, body: bytes, is_answer: bool
) -> None:
    outcome = read_answer(endpoint, 200, CIMultiDict(), body, 0.5)

    assert isinstance(outcome, Completion) == is_answer
    if isinstance(outcome, Failure):
        assert outcome.code == FailureCode.RESPONSE_UNREADABLE
        assert outcome.message.startswith("HTTP status 200, but without `")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        ({"code": 429, "message": "slow down"}, 429, FailureCode.ENGINE_OVERLOADED),
        ({"code": "503"}, 503, FailureCode.ENGINE_OVERLOADED),
        ({"code": 500.0}, 500, FailureCode.ENGINE_ERROR),
        ({"code": "rate_limit_exceeded"}, 429, FailureCode.ENGINE_OVERLOADED),
        ({"type": "overloaded_error"}, 503, FailureCode.ENGINE_OVERLOADED),
        ({"status": "RESOURCE_EXHAUSTED"}, 429, FailureCode.ENGINE_OVERLOADED),
        ({"code": None, "type": "server_error"}, 500, FailureCode.ENGINE_ERROR),
        ("Overloaded", 503, FailureCode.ENGINE_OVERLOADED),
        ({"code": 400}, 400, FailureCode.ENGINE_REFUSED),
        ({"code": "context_length_exceeded"}, 400, FailureCode.CONTEXT_LENGTH_EXCEEDED),
        ({"code": "model_not_found"}, 404, FailureCode.MODEL_NOT_FOUND),
        ({"code": 401}, 401, FailureCode.ENGINE_REFUSED),
        ({"code": "504"}, 504, FailureCode.TIMEOUT),
        ({"message": "no words for it"}, 200, FailureCode.RESPONSE_UNREADABLE),
        ({"code": 1302}, 200, FailureCode.RESPONSE_UNREADABLE),
        ({"code": True}, 200, FailureCode.RESPONSE_UNREADABLE),
        ({"code": [429]}, 200, FailureCode.RESPONSE_UNREADABLE),
        ([{"code": 429}], 200, FailureCode.RESPONSE_UNREADABLE),
        (True, 200, FailureCode.RESPONSE_UNREADABLE),
    ],
)
def test_an_error_with_status_200_is_a_failure_and_counts_as_the_status_that_it_names(
    error: Any, status: int, code: FailureCode
) -> None:
    body = {"error": error, "choices": [{"finish_reason": "error"}]}

    outcome = failure(200, msgspec.json.encode(body))

    assert (outcome.status, outcome.code) == (status, code)
    assert outcome.message.startswith("HTTP status 200, but with an error")


def test_an_error_without_its_own_object_counts_as_the_status_that_it_names() -> None:
    outcome = failure(200, b'{"object": "error", "message": "older vLLM", "code": 503}')

    assert (outcome.status, outcome.code) == (503, FailureCode.ENGINE_OVERLOADED)
    assert "older vLLM" in outcome.message


@pytest.mark.parametrize(
    ("error", "code", "retried"),
    [
        (b'{"code": 429, "message": "slow down"}', FailureCode.ENGINE_OVERLOADED, True),
        (b'{"code": 502, "message": "upstream"}', FailureCode.ENGINE_ERROR, True),
        (b'{"code": 403, "message": "flagged"}', FailureCode.ENGINE_REFUSED, False),
        (b'"something"', FailureCode.RESPONSE_UNREADABLE, True),
    ],
)
def test_an_error_within_a_choice_is_no_answer(
    error: bytes, code: FailureCode, retried: bool
) -> None:
    """As gateways say it that have begun to answer when the model behind them fails."""
    sound = b'{"finish_reason": "stop", "error": null, "text": "yes"}'
    outcome = failure(200, b'{"choices": [%s, {"text": "ye", "error": %s}]}' % (sound, error))

    assert (outcome.code, outcome.retryable) == (code, retried)
    assert "with an error" in outcome.message
    assert completion(b'{"choices": [%s]}' % sound).finish_reason == "stop"


def test_a_number_that_no_reader_of_the_output_could_convert_is_unreadable() -> None:
    """One such line would end the loop of whoever reads the file with `json.loads`."""
    digits = b"9" * 5000

    outcome = failure(200, b'{"choices": [{"text": "yes"}], "created": %s}' % digits)

    assert outcome.code is FailureCode.RESPONSE_UNREADABLE
    assert "thousands of digits" in outcome.message
    completion(b'{"choices": [{"text": "\\"%s"}], "created": 1}' % digits)


def test_an_error_with_a_number_out_of_range_is_an_error_all_the_same() -> None:
    outcome = failure(200, b'{"choices": [{}], "error": {"code": 1e999}}')

    assert outcome.code == FailureCode.RESPONSE_UNREADABLE


def test_an_answer_of_nothing_but_objects_takes_little_more_memory_than_its_bytes() -> None:
    body = b'{"choices": [%s]}' % b",".join([b"{}"] * 1_200_000)

    tracemalloc.start()
    outcome = completion(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(outcome.body) == len(body)
    assert peak < 3 * len(body)


CODES = st.sampled_from(["429", "overloaded", 500, 1e300, None, [], {"code": {}}])
MEMBERS = st.dictionaries(
    st.sampled_from(["id", "choices", "data", "usage", "error", "message", "detail", "code"]),
    st.recursive(
        CODES | st.integers() | st.text() | st.booleans(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["code", "type", "message", "prompt_tokens", "finish_reason"]),
                inner,
            )
        ),
        max_leaves=8,
    ),
)
HEADERS = st.dictionaries(
    st.sampled_from(["X-Request-Id", "Retry-After", "Date", "Content-Type"]),
    st.text(st.characters(codec=None), max_size=40)
    | st.sampled_from(["Fri, 31 Dec 9999 23:59:59 -2359", "9" * 400, "inf", "Mon, 01 Jan 0001"]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(100, 999),
    HEADERS,
    st.binary(max_size=60) | MEMBERS.map(lambda members: json.dumps(members).encode()),
)
@example(429, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 -2359", "Date": "Mon, 01 Jan 0001"}, b"")
def test_any_answer_means_one_outcome_that_can_be_stored(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    outcome = read_answer(ENDPOINT, status, CIMultiDict(headers), body, 0.5)

    assert stored(outcome)
    if isinstance(outcome, Failure):
        assert 0 <= (outcome.retry_after_seconds or 0) < float("inf")
        assert len(outcome.message) <= 2000


def test_an_answer_is_aborted_if_any_of_its_choices_is() -> None:
    body = b'{"choices": [{"finish_reason": "stop"}, {"finish_reason": "abort"}]}'

    assert completion(body).finish_reason == ABORTED


@pytest.mark.parametrize(
    "body",
    [b"", b"OK", b"[]", b'"text"', b"null", b'{"choices": [', b'{"a": "\xff"}', b"{}{}"],
)
def test_a_success_that_is_not_a_json_object_is_unreadable(body: bytes) -> None:
    outcome = failure(200, body)

    assert outcome.code == FailureCode.RESPONSE_UNREADABLE
    assert outcome.retryable
    assert outcome.status == 200
    assert outcome.body is None


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (302, FailureCode.ENGINE_REFUSED, False),
        (400, FailureCode.ENGINE_REFUSED, False),
        (401, FailureCode.ENGINE_REFUSED, False),
        (404, FailureCode.ENGINE_REFUSED, False),
        (408, FailureCode.TIMEOUT, True),
        (413, FailureCode.ENGINE_REFUSED, False),
        (422, FailureCode.ENGINE_REFUSED, False),
        (429, FailureCode.ENGINE_OVERLOADED, True),
        (500, FailureCode.ENGINE_ERROR, True),
        (501, FailureCode.UNSUPPORTED_ENDPOINT, False),
        (502, FailureCode.ENGINE_ERROR, True),
        (503, FailureCode.ENGINE_OVERLOADED, True),
        (504, FailureCode.TIMEOUT, True),
        (529, FailureCode.ENGINE_ERROR, True),
    ],
)
def test_each_status_has_its_code(status: int, code: FailureCode, retryable: bool) -> None:
    outcome = failure(status, openai_error("no"))

    assert (outcome.code, outcome.retryable, outcome.status) == (code, retryable, status)
    assert outcome.message == "no"
    assert outcome.body is not None
    assert bytes(outcome.body) == openai_error("no")


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        # vLLM 0.32: chat, completions, max_tokens; then older ones.
        (400, "This model's maximum context length is 512 tokens. However, …", 400),
        (400, "max_tokens=99999 cannot be greater than max_model_len=512. Please …", 400),
        (400, "The decoder prompt is longer than the maximum model length of 512.", 400),
        # OpenAI: the code says it, in whatever words.
        (400, "Too much.", "context_length_exceeded"),
        # llama.cpp
        (400, "the request exceeds the available context size, try increasing it", 400),
    ],
)
def test_a_request_too_long_for_the_model_is_told_apart(
    status: int, message: str, code: str | int
) -> None:
    outcome = failure(status, openai_error(message, code))

    assert outcome.code == FailureCode.CONTEXT_LENGTH_EXCEEDED
    assert not outcome.retryable


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (404, "The model `x` does not exist. Valid aliases: tiny.", 404),
        (404, "Not here.", "model_not_found"),
        (400, "The model 'x' was not found.", None),
    ],
)
def test_an_unknown_model_is_told_apart(status: int, message: str, code: str | int | None) -> None:
    assert failure(status, openai_error(message, code)).code == FailureCode.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"object": "error", "message": "older vLLM", "code": 400}', "older vLLM"),
        (b'{"error": "text-generation-inference", "error_type": "x"}', "text-generation-inference"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["body"]}]}', '{"detail": [{"loc": ["body"]}]}'),
        (b"<html>Bad Gateway</html>", "<html>Bad Gateway</html>"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", "HTTP status 400 without a message"),
    ],
)
def test_the_message_is_found_wherever_a_server_puts_it(body: bytes, message: str) -> None:
    assert failure(400, body).message == message


@pytest.mark.parametrize("body", [b"<html></html>", b"", b"[1]", b"\xff"])
def test_a_failure_keeps_only_a_body_that_is_a_json_object(body: bytes) -> None:
    assert failure(500, body).body is None


def test_a_long_message_is_cut() -> None:
    assert len(failure(400, openai_error("x" * 10_000)).message) == 2000


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("1.5", 1.5),
        ("Mon, 23 Nov 2026 20:00:30 GMT", 30.0),
        ("Mon, 23 Nov 2026 19:00:00 GMT", 0.0),
        ("soon", None),
        ("-3", None),
        ("", None),
        ("inf", None),
        ("nan", None),
        ("1e9", None),
        ("9" * 400, LARGEST_COUNT),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 251_606_836_799.0),
    ],
)
def test_retry_after_is_seconds_or_a_date_by_the_servers_clock(
    header: str, seconds: float | None
) -> None:
    date = "Mon, 23 Nov 2026 20:00:00 GMT"

    assert failure(429, retry_after=header, date=date).retry_after_seconds == seconds


def test_a_date_without_the_servers_clock_means_nothing() -> None:
    outcome = failure(503, retry_after="Mon, 23 Nov 2026 20:00:30 GMT")

    assert outcome.retry_after_seconds is None
