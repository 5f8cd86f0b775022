"""Reads the HTTP response of an OpenAI-compatible server as a completion or a failure.

Responses are as untrusted as requests: any status, headers and bytes map to exactly one outcome,
and that outcome can be stored.
"""

import codecs
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from batch_orchestration.core.foreign_json import BadJson, check_depth, check_digits, decode
from batch_orchestration.core.outcomes import (
    LARGEST_COUNT,
    Completion,
    Failure,
    FailureCode,
    Outcome,
    Usage,
)

#: Keeps an HTML page of a proxy from filling the error file.
MESSAGE_MAX_LENGTH = 2000

#: vLLM ("This model's maximum context length is …", "… longer than the maximum model length of
#: …", "… is larger than the maximum context length …"), OpenAI's code, SGLang, llama.cpp.
_CONTEXT_LENGTH = re.compile(
    r"context_length_exceeded|maximum context length|maximum model length|max_model_len"
    r"|model's context length|exceeds? (the )?(available |model's )?context (size|length|window)",
    re.IGNORECASE,
)
#: Finish reason of all requests that vLLM ends when it terminates: status 200 and a partial text.
ABORTED = "abort"
_MODEL_NOT_FOUND = re.compile(
    r"model_not_found|\bmodel\b.*(does not exist|not found)|no such model", re.IGNORECASE
)
#: Fields that hold the answers, by endpoint; another endpoint may use any of them.
_ANSWERS = {
    "/v1/chat/completions": ("choices",),
    "/v1/completions": ("choices",),
    "/v1/embeddings": ("data",),
    "/v1/score": ("data",),
    "/v1/rerank": ("results",),
    "/v1/responses": ("output",),
}
_ANYWHERE = ("choices", "data", "results", "output")

_SECONDS = re.compile(r"\d+(\.\d+)?", re.ASCII)
_INTEGER = re.compile(rb"-?\d+")
_DIGITS_OF_COUNTS = len(str(LARGEST_COUNT))
_FILLED_LIST = re.compile(rb"\s*\[\s*\{")
#: An answer may consist of empty objects, each of which takes ten times its bytes when decoded.
_MOST_OBJECTS = 2**20
#: A longer error is not decoded: the code of an error is short.
_LONGEST_ERROR = 2**16
_ERROR_STATUS = re.compile(r"[45]\d\d(\.0)?", re.ASCII)
#: Words that gateways use instead of a status, in `code`, `type` or `status` of an error.
_STATUS_OF_WORDS = {
    429: re.compile(r"rate.?limit|too.?many|quota|throttl|exhausted", re.IGNORECASE),
    503: re.compile(r"overload|unavailable|capacity|busy", re.IGNORECASE),
    504: re.compile(r"timed?.?out|deadline", re.IGNORECASE),
    400: re.compile(
        r"context.?length|(bad|invalid).?(request|argument|param)|content.?(filter|policy)",
        re.IGNORECASE,
    ),
    401: re.compile(r"api.?key|unauthori[sz]ed|authenticat", re.IGNORECASE),
    403: re.compile(r"permission|forbidden", re.IGNORECASE),
    404: re.compile(r"not.?found", re.IGNORECASE),
    500: re.compile(r"server.?error|internal|api.?error", re.IGNORECASE),
}
#: UTF-8 is checked in pieces: in a decoded text, one emoji makes every character four bytes long.
_PIECE_BYTES = 2**20

_NULL = msgspec.Raw(b"null")


class _Head(msgspec.Struct):
    """The fields of an answer that are read, decoded separately; the rest is passed on unread."""

    id: msgspec.Raw = _NULL
    choices: msgspec.Raw = _NULL
    data: msgspec.Raw = _NULL
    results: msgspec.Raw = _NULL
    output: msgspec.Raw = _NULL
    usage: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL
    message: msgspec.Raw = _NULL
    detail: msgspec.Raw = _NULL
    code: msgspec.Raw = _NULL
    status: msgspec.Raw = _NULL
    type: msgspec.Raw = _NULL


class _Choice(msgspec.Struct, gc=False):
    finish_reason: msgspec.Raw = _NULL
    error: msgspec.Raw = _NULL


class _Usage(msgspec.Struct):
    prompt_tokens: msgspec.Raw = _NULL
    completion_tokens: msgspec.Raw = _NULL


_decode_head = msgspec.json.Decoder(_Head).decode
_decode_choices = msgspec.json.Decoder(list[_Choice]).decode
_decode_usage = msgspec.json.Decoder(_Usage).decode


def read_answer(
    endpoint: str, status: int, headers: Mapping[str, str], body: bytes, latency_seconds: float
) -> Outcome:
    """Return the outcome of an HTTP response. Never raises.

    Args:
        endpoint: Determines the fields that an answer must have.
        headers: The response's headers; the mapping ignores case, as aiohttp's does.
        body: The decompressed response.
        latency_seconds: From submission to the last byte.
    """
    try:
        head = _read_head(body)
    except BadJson as error:
        head, why = None, error.reason
    if head is not None and not _value(head.error):
        head.error = _error_of_a_choice(head.choices)
    if not 200 <= status < 300:
        message = _message(head, body) or f"HTTP status {status} without a message"
        code = _failure_code(status, head, message)
    elif head is None:
        message = f"HTTP status {status}, but not a JSON object ({why}): {_excerpt(body)!r}"
        code = FailureCode.RESPONSE_UNREADABLE
    elif (lack := _lack(endpoint, head)) is None:
        return Completion(
            status=status,
            body=msgspec.Raw(body),
            request_id=_request_id(headers, head),
            finish_reason=_finish_reason(head.choices),
            usage=_usage(head.usage),
            latency_seconds=latency_seconds,
        )
    else:
        text = _message(head, body)
        message = f"HTTP status {status}, but {lack}: {text}"
        if (inner := _inner_status(head)) is None:
            code = FailureCode.RESPONSE_UNREADABLE
        else:
            status, code = inner, _failure_code(inner, head, text)
    return Failure(
        code=code,
        message=message[:MESSAGE_MAX_LENGTH],
        status=status,
        body=None if head is None else msgspec.Raw(body),
        request_id=_request_id(headers, head),
        retry_after_seconds=_retry_after(headers),
        latency_seconds=latency_seconds,
    )


def _read_head(body: bytes) -> _Head:
    """Read the fields of an answer.

    Raises:
        BadJson: The body is not a JSON object that can be stored.
    """
    check_depth(body)
    check_digits(body)
    try:
        # msgspec skips strings of undeclared fields without checking their bytes.
        _check_utf8(body)
        return _decode_head(body)
    except msgspec.ValidationError as error:
        raise BadJson("not an object") from error
    except UnicodeDecodeError as error:
        raise BadJson("not UTF-8") from error
    except msgspec.DecodeError as error:
        raise BadJson(str(error)) from error


def _check_utf8(body: bytes) -> None:
    if body.isascii():
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(body), _PIECE_BYTES):
        decoder.decode(body[start : start + _PIECE_BYTES])
    decoder.decode(b"", final=True)


def _lack(endpoint: str, head: _Head) -> str | None:
    """Return why a JSON object with status 2xx is not an answer; None if it is one."""
    if _value(head.error):
        return "with an error"
    places = _ANSWERS.get(endpoint, _ANYWHERE)
    if any(_FILLED_LIST.match(getattr(head, place)) for place in places):
        return None
    return f"without {' or '.join(f'`{place}`' for place in places)}"


def _usage(raw: msgspec.Raw) -> Usage:
    try:
        usage = _decode_usage(raw)
    except msgspec.DecodeError:
        return Usage()
    return Usage(
        prompt_tokens=whole_number(usage.prompt_tokens) or 0,
        completion_tokens=whole_number(usage.completion_tokens) or 0,
    )


def whole_number(raw: msgspec.Raw) -> int | None:
    """Return a JSON integer, clamped to 0 … `LARGEST_COUNT`; None for anything else."""
    text = bytes(raw).strip()
    if not _INTEGER.fullmatch(text):
        return None
    # Python refuses to convert thousands of digits.
    wide = len(text) > _DIGITS_OF_COUNTS
    return 0 if text.startswith(b"-") else LARGEST_COUNT if wide else min(int(text), LARGEST_COUNT)


def _error_of_a_choice(choices: msgspec.Raw) -> msgspec.Raw:
    """Return the first error that a gateway put into a choice; it invalidates all choices."""
    if b'"error"' not in bytes(choices):
        return _NULL
    return next((choice.error for choice in _choices(choices) if _value(choice.error)), _NULL)


def _choices(raw: msgspec.Raw) -> list[_Choice]:
    """Return the choices; none if they are not a list of objects, or if there are too many."""
    if bytes(raw).count(b"{") > _MOST_OBJECTS:
        return []
    try:
        return _decode_choices(raw)
    except msgspec.DecodeError:
        return []


def _finish_reason(choices: msgspec.Raw) -> str | None:
    """Return the first choice's reason; `ABORTED` if any was aborted, since a part is missing."""
    reasons = [_value(choice.finish_reason) for choice in _choices(choices)]
    first = ABORTED if ABORTED in reasons else next(iter(reasons), None)
    return first if isinstance(first, str) else None


def _inner_status(head: _Head) -> int | None:
    """Return the HTTP status that an error itself contains, as a number or as a word."""
    error = _value(head.error)
    inner = error if isinstance(error, dict) else {"code": error}
    named = [inner.get(name) for name in ("code", "status", "status_code", "type")]
    named += [_value(raw) for raw in (head.code, head.status, head.type)]
    words = [str(word).strip() for word in named if isinstance(word, str | int | float)]
    if number := next(filter(_ERROR_STATUS.fullmatch, words), None):
        return int(number[:3])
    return next(
        (
            status
            for word in words
            for status, pattern in _STATUS_OF_WORDS.items()
            if pattern.search(word)
        ),
        None,
    )


def _value(raw: msgspec.Raw) -> Any:
    """Return a small value decoded; a large or invalid one as the beginning of its text."""
    if len(raw) <= _LONGEST_ERROR:
        try:
            return decode(raw)
        except BadJson:
            pass
    return _excerpt(bytes(raw))


def _failure_code(status: int, head: _Head | None, message: str) -> FailureCode:
    match status:
        case 429 | 503:
            return FailureCode.ENGINE_OVERLOADED
        case 408 | 504:
            return FailureCode.TIMEOUT
        case 501:
            # vLLM's status for an endpoint that its model lacks: a retry changes nothing.
            return FailureCode.UNSUPPORTED_ENDPOINT
        case _ if status >= 500:
            return FailureCode.ENGINE_ERROR
    text = f"{_error_word(head)} {message}"
    if status in {400, 404} and _MODEL_NOT_FOUND.search(text):
        return FailureCode.MODEL_NOT_FOUND
    if status in {400, 413, 422} and _CONTEXT_LENGTH.search(text):
        return FailureCode.CONTEXT_LENGTH_EXCEEDED
    return FailureCode.ENGINE_REFUSED


def _error_word(head: _Head | None) -> str:
    """Return OpenAI's `error.code` if it is a string."""
    error = None if head is None else _value(head.error)
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else ""


def _message(head: _Head | None, body: bytes) -> str:
    """Return the server's error message, in OpenAI's, older vLLM's or FastAPI's shape."""
    if head is None:
        return _excerpt(body)
    error = _value(head.error)
    places = (
        error.get("message") if isinstance(error, dict) else error,
        _value(head.message),
        _value(head.detail),
    )
    return next((place for place in places if isinstance(place, str) and place), _excerpt(body))


def _excerpt(body: bytes) -> str:
    return body[:200].decode(errors="replace").strip()


def _request_id(headers: Mapping[str, str], head: _Head | None) -> str | None:
    """Return the request id of the response, from its headers or else from its body."""
    of_body = None if head is None else _value(head.id)
    return headers.get("x-request-id") or (of_body if isinstance(of_body, str) else None)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return `Retry-After` in seconds; a date is relative to the server's own clock, `Date`."""
    value = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(value):
        return min(float(value), LARGEST_COUNT)
    try:
        until, now = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("date", ""))
        return max(0.0, (until - now).total_seconds())
    except (TypeError, ValueError, OverflowError):
        return None
