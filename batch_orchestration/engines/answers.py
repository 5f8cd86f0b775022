"""What an HTTP answer of an OpenAI-compatible server means: a completion or a failure."""

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from batch_orchestration.domain.outcomes import Completion, Failure, FailureCode, Outcome, Usage

#: A page of HTML from a proxy need not fill the error file.
MESSAGE_MAX_LENGTH = 2000

#: vLLM ("This model's maximum context length is …", "… longer than the maximum model length of
#: …", "… is larger than the maximum context length …"), OpenAI's code, SGLang, llama.cpp.
_CONTEXT_LENGTH = re.compile(
    r"context_length_exceeded|maximum context length|maximum model length|max_model_len"
    r"|model's context length|exceeds? (the )?(available |model's )?context (size|length|window)",
    re.IGNORECASE,
)
#: How vLLM's engine, when it is told to end, finishes all that it has: status 200 and half a text.
ABORTED = "abort"
_SECONDS = re.compile(r"\d+(\.\d+)?", re.ASCII)
_MODEL_NOT_FOUND = re.compile(
    r"model_not_found|\bmodel\b.*(does not exist|not found)|no such model", re.IGNORECASE
)


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(msgspec.Struct):
    """The few fields of an answer that are read; the rest is passed on unread."""

    id: str | None = None
    choices: list[_Choice] | None = None
    usage: _Usage | None = None


_answer_decoder = msgspec.json.Decoder(_Answer)
_object_decoder = msgspec.json.Decoder(dict[str, Any])


def read_answer(
    status: int, headers: Mapping[str, str], body: bytes, latency_seconds: float
) -> Outcome:
    """Return the outcome that an HTTP answer stands for.

    Args:
        status: HTTP status.
        headers: Of the answer; the mapping ignores case, as aiohttp's does.
        body: The answer, decompressed.
        latency_seconds: From submission to the last byte.
    """
    if 200 <= status < 300:
        return _read_success(status, headers, body, latency_seconds)
    answer = _read_object(body)
    message = _message(answer, body) or f"HTTP status {status} without a word"
    return Failure(
        code=_failure_code(status, answer, message),
        message=message[:MESSAGE_MAX_LENGTH],
        status=status,
        body=None if answer is None else msgspec.Raw(body),
        request_id=_request_id(headers, None),
        retry_after_seconds=_retry_after(headers),
        latency_seconds=latency_seconds,
    )


def _read_success(
    status: int, headers: Mapping[str, str], body: bytes, latency_seconds: float
) -> Outcome:
    try:
        answer = _decode_answer(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return Failure(
            code=FailureCode.RESPONSE_UNREADABLE,
            message=f"HTTP status {status}, but not a JSON object ({error}): {_excerpt(body)!r}",
            status=status,
            request_id=_request_id(headers, None),
            latency_seconds=latency_seconds,
        )
    usage = answer.usage or _Usage()
    return Completion(
        status=status,
        body=msgspec.Raw(body),
        request_id=_request_id(headers, answer.id),
        finish_reason=_finish_reason(answer.choices or []),
        usage=Usage(
            prompt_tokens=usage.prompt_tokens or 0,
            completion_tokens=usage.completion_tokens or 0,
        ),
        latency_seconds=latency_seconds,
    )


def _finish_reason(choices: list[_Choice]) -> str | None:
    """Return the first choice's, or `ABORTED` if any choice was: then the answer is not whole."""
    reasons = [choice.finish_reason for choice in choices]
    return ABORTED if ABORTED in reasons else next(iter(reasons), None)


def _decode_answer(body: bytes) -> _Answer:
    """Read the fields; an answer whose fields have other types than OpenAI's is still an answer."""
    body.decode()  # msgspec skips over strings that nobody asked for without a look at their bytes
    try:
        return _answer_decoder.decode(body)
    except msgspec.ValidationError:
        _object_decoder.decode(body)
        return _Answer()


def _read_object(body: bytes) -> dict[str, Any] | None:
    try:
        return _object_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _failure_code(status: int, answer: dict[str, Any] | None, message: str) -> FailureCode:
    match status:
        case 429 | 503:
            return FailureCode.ENGINE_OVERLOADED
        case 408 | 504:
            return FailureCode.TIMEOUT
        case 501:
            # vLLM's word for an endpoint that is not its model's: asking again changes nothing.
            return FailureCode.UNSUPPORTED_ENDPOINT
        case _ if status >= 500:
            return FailureCode.ENGINE_ERROR
    text = f"{_error_word(answer)} {message}"
    if status in {400, 404} and _MODEL_NOT_FOUND.search(text):
        return FailureCode.MODEL_NOT_FOUND
    if status in {400, 413, 422} and _CONTEXT_LENGTH.search(text):
        return FailureCode.CONTEXT_LENGTH_EXCEEDED
    return FailureCode.ENGINE_REFUSED


def _error_word(answer: dict[str, Any] | None) -> str:
    """Return OpenAI's `error.code`, where that is a word."""
    error = (answer or {}).get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""


def _message(answer: dict[str, Any] | None, body: bytes) -> str:
    """Return what the server says for people: OpenAI's, older vLLM's, or FastAPI's shape."""
    if answer is None:
        return _excerpt(body)
    error = answer.get("error")
    places = (
        error.get("message") if isinstance(error, dict) else error,
        answer.get("message"),
        answer.get("detail"),
    )
    return next((place for place in places if isinstance(place, str) and place), _excerpt(body))


def _excerpt(body: bytes) -> str:
    return body[:200].decode(errors="replace").strip()


def _request_id(headers: Mapping[str, str], body_id: str | None) -> str | None:
    return headers.get("x-request-id") or body_id


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return `Retry-After` in seconds; a date counts from the server's own clock, in `Date`."""
    value = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        until, now = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("date", ""))
        return max(0.0, (until - now).total_seconds())
    except (TypeError, ValueError):
        return None
