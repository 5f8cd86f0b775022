"""What becomes of a request: a completion or a failure, and the codes of failure."""

from enum import StrEnum

import msgspec


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
    # The verdict of `domain.isolation`: the request stood alone, and the engine died.
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


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one answered request, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


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


class Failure(msgspec.Struct, frozen=True, kw_only=True, tag="failure"):
    """Why a request has no answer.

    Attributes:
        status: HTTP status if an engine answered at all, else None.
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

    @property
    def retryable(self) -> bool:
        """Whether the same request may fare better another time."""
        return self.code in RETRYABLE


Outcome = Completion | Failure
