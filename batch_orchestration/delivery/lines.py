"""The lines of output and error files, in the shape of OpenAI's Batch API."""

import hashlib

import msgspec

from batch_orchestration.core.outcomes import Completion, Failure
from batch_orchestration.core.results import SettledRequest

#: The lowest HTTP status of a request that was not answered.
_FIRST_ERROR_STATUS = 400
_FIRST_SERVER_ERROR_STATUS = 500
_ID_BYTES = 12


class _Response(msgspec.Struct):
    """An engine's HTTP response, a completion or an error."""

    status_code: int
    request_id: str | None
    body: msgspec.Raw


class _Error(msgspec.Struct):
    """Why there is no response."""

    code: str
    message: str


class _OutputLine(msgspec.Struct):
    """One line of either file, with the fields in OpenAI's order."""

    id: str
    custom_id: str | None
    response: _Response | None
    error: _Error | None


class _AnswerHead(msgspec.Struct):
    """The part of an error body that shows whether it has OpenAI's shape."""

    error: msgspec.Raw = msgspec.Raw(b"null")


_encode = msgspec.json.Encoder().encode
_decode_answer_head = msgspec.json.Decoder(_AnswerHead).decode


def output_line(batch_id: str, request: SettledRequest) -> bytes:
    """Return the request's line, newline included.

    A completion and an HTTP error are both a `response`, with `error` null; `error` is set only if
    no engine answered. Bodies keep their bytes, unless they span lines. The same request always
    gives the same line.
    """
    outcome = request.outcome
    response: _Response | None = None
    error: _Error | None = None
    if isinstance(outcome, Completion):
        response = _Response(outcome.status, outcome.request_id, _one_line(outcome.body))
    elif outcome.status is not None and outcome.status >= _FIRST_ERROR_STATUS:
        body = _error_body(outcome, outcome.status)
        response = _Response(outcome.status, outcome.request_id, body)
    else:
        error = _Error(str(outcome.code), outcome.message)
    line_id = output_line_id(batch_id, request.index)
    return _encode(_OutputLine(line_id, request.custom_id, response, error)) + b"\n"


def output_line_id(batch_id: str, index: int) -> str:
    """Return the id of a request's line, which depends only on batch and index."""
    digest = hashlib.blake2b(f"{batch_id}/{index}".encode(), digest_size=_ID_BYTES)
    return f"batch_req_{digest.hexdigest()}"


def _error_body(failure: Failure, status: int) -> msgspec.Raw:
    """Return the engine's own body if it has OpenAI's shape, else one built from the failure."""
    if failure.body is not None:
        try:
            head = _decode_answer_head(failure.body)
        except msgspec.DecodeError:
            head = _AnswerHead()
        if bytes(head.error).lstrip().startswith(b"{"):
            return _one_line(failure.body)
    server_side = status >= _FIRST_SERVER_ERROR_STATUS
    error = {
        "message": failure.message,
        "type": "server_error" if server_side else "invalid_request_error",
        "param": None,
        "code": str(failure.code),
    }
    return msgspec.Raw(_encode({"error": error}))


def _one_line(body: msgspec.Raw) -> msgspec.Raw:
    # JSON allows no line break inside a string, so each one is only layout.
    raw = bytes(body)
    if b"\n" in raw or b"\r" in raw:
        raw = msgspec.json.format(raw, indent=-1)
    return msgspec.Raw(raw)
