"""The lines of output and error files, in the shape of OpenAI's Batch API."""

import base64
import binascii
import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from batch_orchestration.core import foreign_json
from batch_orchestration.core.outcomes import Completion, Failure
from batch_orchestration.core.results import SIMULATED, SettledRequest

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


#: An embedding may be encoded as base64 of 32-bit floats.
_FLOAT_BYTES = 4
#: Fields of a response that list its choices: text, or embeddings.
_CHOICES = ("choices", "data")


class FlatOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One request with its outcome, in the order of the columns.

    Attributes:
        index: Position in the batch, from 0.
        line: Line number in the file, from 1.
        status: `completed` or `failed`.
        code: Failure code; None for an answer, like `message`.
        choices: Number of choices in the answer, for `n`, a list of prompts or a list of texts to
            embed. The following columns describe the first choice.
        text: None if the first choice has no text (a tool call, an embedding).
        embedding_length: Numbers in the first embedding; None for other answers.
        prompt_tokens: None for a failure, like `completion_tokens`.
        attempts: Number of submissions; 0 if the request was rejected at admission.
        engine: Kind of engine; empty if none was asked.
        simulated: Whether the simulated engine made up the answer.
    """

    custom_id: str | None
    index: int
    line: int
    status: str
    code: str | None = None
    message: str | None = None
    choices: int | None = None
    text: str | None = None
    embedding_length: int | None = None
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_seconds: float
    attempts: int
    engine: str
    model: str
    simulated: bool


def flat_outcome(request: SettledRequest) -> FlatOutcome:
    """Return the flat row of a settled request."""
    outcome, by = request.outcome, request.provenance
    flat = FlatOutcome(
        custom_id=request.custom_id,
        index=request.index,
        line=request.line,
        status="completed",
        latency_seconds=outcome.latency_seconds,
        attempts=request.attempts,
        engine=by.engine,
        model=by.model,
        simulated=by.engine == SIMULATED,
    )
    if not isinstance(outcome, Completion):
        return msgspec.structs.replace(
            flat, status="failed", code=str(outcome.code), message=outcome.message
        )
    answer = _decoded(outcome.body)
    return msgspec.structs.replace(
        flat,
        choices=_choices(answer),
        text=_text(answer),
        embedding_length=_embedding_length(answer),
        finish_reason=outcome.finish_reason,
        prompt_tokens=outcome.usage.prompt_tokens,
        completion_tokens=outcome.usage.completion_tokens,
    )


def _decoded(body: msgspec.Raw) -> object:
    try:
        return foreign_json.decode(body)
    except foreign_json.BadJson:
        return None


def _first(answer: object, field: str) -> Mapping[str, Any]:
    items = answer.get(field) if isinstance(answer, dict) else None
    first = items[0] if isinstance(items, list) and items else None
    return first if isinstance(first, dict) else {}


def _choices(answer: object) -> int | None:
    items = [answer.get(field) for field in _CHOICES] if isinstance(answer, dict) else []
    return next((len(each) for each in items if isinstance(each, list)), None)


def _text(answer: object) -> str | None:
    choice = _first(answer, "choices")
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    return text if isinstance(text, str) else None


def _embedding_length(answer: object) -> int | None:
    embedding = _first(answer, "data").get("embedding")
    if isinstance(embedding, list):
        return len(embedding)
    if isinstance(embedding, str):
        try:
            return len(base64.b64decode(embedding, validate=True)) // _FLOAT_BYTES
        except binascii.Error:
            return None
    return None
