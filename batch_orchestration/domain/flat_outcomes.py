"""A settled request as one flat row: what tables and data frames are made of."""

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import msgspec

from batch_orchestration.core import foreign_json
from batch_orchestration.core.outcomes import Completion
from batch_orchestration.core.results import SIMULATED, SettledRequest

#: An embedding may come as base64 of 32-bit floats.
_FLOAT_BYTES = 4
#: Where the answers of a response are: text, or embeddings.
_CHOICES = ("choices", "data")


class FlatOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One request with its outcome, in the order of the columns.

    Attributes:
        index: Place in the batch, from 0.
        line: Line number in the file, from 1.
        status: `completed` or `failed`.
        code: Of the failure, as is `message`; None for an answer.
        choices: How many the answer has: of `n`, of a list of prompts or of texts to embed. The
            columns that follow are about the first.
        text: Of the first choice; None if it has none (a tool call, an embedding).
        embedding_length: Numbers in the first embedding; None for other answers.
        prompt_tokens: None for a failure, as is `completion_tokens`.
        attempts: How often it was submitted; 0 if refused at admission.
        engine: Kind of engine; empty if none was asked.
        simulated: Whether the answer is made up.
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
