"""What becomes of a request: a completion or a failure, and the codes of failure.

Whatever an engine says, an outcome can be kept: counts and texts are brought into range when it is
made, also from a journal that says otherwise.
"""

import re
from enum import StrEnum

import msgspec

#: Of tokens. No request has more, and whatever is added up of such counts fits 64 bits.
LARGEST_COUNT = 2**31 - 1
#: Of an engine's id of a request, and of its word for why it stopped.
LONGEST_WORD = 512
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class FailureCode(StrEnum):
    """Why a request was not answered. OpenAI's word where it has one.

    `docs/failure-modes.md` says of each what it means and what to do; a test compares the two.
    """

    # Found in the file, before any engine saw the request.
    INVALID_JSON = "invalid_json"
    INVALID_REQUEST = "invalid_request"
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    UNSUPPORTED_ENDPOINT = "unsupported_endpoint"
    # Said by the engine: final.
    MODEL_NOT_FOUND = "model_not_found"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    ENGINE_REFUSED = "engine_refused"
    # The engine's trouble: retried, then recorded.
    ENGINE_OVERLOADED = "engine_overloaded"
    ENGINE_ERROR = "engine_error"
    TIMEOUT = "timeout"
    CONNECTION_LOST = "connection_lost"
    RESPONSE_UNREADABLE = "response_unreadable"
    # The verdict of `inference.faults.isolation`: the request stood alone, and the engine died.
    ENGINE_KILLED = "engine_killed"
    # The same, where the engine died of exhausted memory on the lowest rung of its ladder.
    OUT_OF_MEMORY = "out_of_memory"
    # OpenAI's words for requests that were left unanswered when their batch ended early.
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
    """Return text that can be encoded: halves of surrogate pairs are replaced."""
    return text if text.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def _word(text: str | None) -> str | None:
    """Return a short text without control characters."""
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
    """Tokens of one answered request, as the engine counted them; 0 … `LARGEST_COUNT`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        """Bring the counts into range."""
        _keep(self, prompt_tokens=_count(self.prompt_tokens))
        _keep(self, completion_tokens=_count(self.completion_tokens))


class Completion(msgspec.Struct, frozen=True, kw_only=True, tag="completion"):
    """A request that the engine answered.

    Attributes:
        status: HTTP status of the answer, 2xx.
        body: The engine's answer, byte for byte.
        request_id: The engine's id of the request, if it told one.
        finish_reason: Of the first choice; None for embeddings.
        latency_seconds: From submission to the last byte of the answer.
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
    """Why a request has no answer.

    Attributes:
        status: HTTP status if an engine answered at all, else None; within a 2xx, the status that
            an error names itself.
        body: The engine's answer byte for byte, if there was one that is JSON.
        retry_after_seconds: How long the engine asked to be left alone.
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
        """Whether the same request may fare better another time."""
        return self.code in RETRYABLE


Outcome = Completion | Failure
