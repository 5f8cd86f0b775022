"""Every HTTP answer that a server may give means exactly one outcome."""

import msgspec
import pytest
from multidict import CIMultiDict

from batch_orchestration.domain.outcomes import Completion, Failure, FailureCode, Usage
from batch_orchestration.engines.answers import ABORTED, read_answer

CHAT = b'{"id": "chatcmpl-1", "choices": [{"index": 0, "finish_reason": "stop"}, {}], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}'  # noqa: E501


def completion(body: bytes, **headers: str) -> Completion:
    outcome = read_answer(200, CIMultiDict(headers), body, 0.5)
    assert isinstance(outcome, Completion)
    return outcome


def failure(status: int, body: bytes = b"", **headers: str) -> Failure:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    outcome = read_answer(status, CIMultiDict(named), body, 0.5)
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
    "body",
    [
        b"{}",
        b'{"usage": null, "choices": null, "id": null}',
        b'{"usage": {"prompt_tokens": null}, "choices": []}',
        b'{"usage": "much", "choices": 3, "id": 5}',
    ],
)
def test_an_answer_without_the_usual_fields_is_an_answer_all_the_same(body: bytes) -> None:
    outcome = completion(body)

    assert bytes(outcome.body) == body
    assert outcome.usage == Usage()
    assert outcome.finish_reason is None


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
        (b"", "HTTP status 400 without a word"),
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
