"""Outcomes of requests: completions, failures and failure codes.

Every outcome can be stored, whatever the engine answered: constructors bring counts and texts into
range, also when an outcome is decoded from a journal.
"""

import re
from enum import StrEnum

import msgspec

#: Largest token count of one request. No request has more, and sums of such counts fit 64 bits.
LARGEST_COUNT = 2**31 - 1
#: Longest `request_id` and `finish_reason`, in characters.
LONGEST_WORD = 512
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class FailureCode(StrEnum):
    """Why a request was not answered; OpenAI's code where it has one.

    `docs/failure-modes.md` describes the meaning and the remedy of each code; a test compares the
    two lists.
    """

    # Found in the file, before the request was sent to an engine.
    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    UNSUPPORTED_ENDPOINT = "unsupported_endpoint"
    # Returned by the engine: final.
    MODEL_NOT_FOUND = "model_not_found"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    ENGINE_REFUSED = "engine_refused"
    # Faults of the engine: retried, then recorded.
    ENGINE_OVERLOADED = "engine_overloaded"
    ENGINE_ERROR = "engine_error"
    TIMEOUT = "timeout"
    CONNECTION_LOST = "connection_lost"
    RESPONSE_UNREADABLE = "response_unreadable"
    # Found by `inference.faults.isolation`: the engine died with this request alone in flight.
    ENGINE_KILLED = "engine_killed"
    # The same, if the engine ran out of memory at its lowest memory level.
    OUT_OF_MEMORY = "out_of_memory"
    # OpenAI's codes for requests left unanswered when their batch ended early.
    BATCH_EXPIRED = "batch_expired"
    BATCH_CANCELLED = "batch_cancelled"


RETRYABLE = frozenset(
    {
        FailureCode.ENGINE_OVERLOADED,
        FailureCode.ENGINE_ERROR,
        FailureCode.TIMEOUT,
        FailureCode.CONNECTION_LOST,
        FailureCode.RESPONSE_UNREADABLE,
    }
)


def unicode_text(text: str) -> str:
    """Return text that can be encoded as UTF-8: lone surrogates are replaced."""
    return text if text.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def _word(text: str | None) -> str | None:
    """Return the text cut to `LONGEST_WORD` characters, control characters replaced."""
    if text is None or (text.isprintable() and text.isascii() and len(text) <= LONGEST_WORD):
        return text
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", unicode_text(text[:LONGEST_WORD]))


def _count(tokens: int) -> int:
    return max(0, min(tokens, LARGEST_COUNT))


def _keep(part: msgspec.Struct, **fields: int | str | None) -> None:
    for name, value in fields.items():
        if value != getattr(part, name):
            msgspec.structs.force_setattr(part, name, value)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of one answered request, as reported by the engine; 0 … `LARGEST_COUNT`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        """Bring the counts into range."""
        _keep(self, prompt_tokens=_count(self.prompt_tokens))
        _keep(self, completion_tokens=_count(self.completion_tokens))


class Completion(msgspec.Struct, frozen=True, kw_only=True, tag="completion"):
    """The outcome of a request that the engine answered.

    Attributes:
        status: HTTP status of the answer, 2xx.
        body: The engine's answer, byte for byte.
        request_id: The engine's id of the request, if the answer has one.
        finish_reason: Finish reason of the first choice; None for embeddings.
        latency_seconds: Time from submission to the last byte of the answer.
    """

    status: int
    body: msgspec.Raw
    request_id: str | None = None
    finish_reason: str | None = None
    usage: Usage = Usage()
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Make the texts storable."""
        _keep(self, request_id=_word(self.request_id), finish_reason=_word(self.finish_reason))


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """The outcome of a request without an answer.

    Attributes:
        status: HTTP status; None if the engine did not respond. If the body of a 2xx response is an
            error, this is the status given in that error.
        body: The engine's response byte for byte, if it is JSON.
        retry_after_seconds: Delay that the engine requested before the next attempt.
    """

    code: FailureCode
    message: str
    status: int | None = None
    body: msgspec.Raw | None = None
    request_id: str | None = None
    retry_after_seconds: float | None = None
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        """Make the texts storable."""
        _keep(self, request_id=_word(self.request_id))
        _keep(self, message=unicode_text(self.message).replace("\0", "\N{REPLACEMENT CHARACTER}"))

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed on another attempt."""
        return self.code in RETRYABLE


Outcome = Completion | Failure
