"""Dead letters: requests whose failure is final, and the operations people can apply to them."""

from enum import StrEnum
from typing import Any

import msgspec

from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.core.results import Attempt, SettledRequest


class DeadLetterState(StrEnum):
    """The state of a dead letter."""

    #: The failure is final unless a person replays or discards the request.
    DEAD = "dead"
    #: A replay includes the request; the failure stands until the replay has an outcome.
    REPLAYING = "replaying"
    #: The request was answered later: the answer is in `results` and in the output file.
    RESOLVED = "resolved"
    #: A person gave the request up, with a reason. It stays in the error file.
    DISCARDED = "discarded"


#: The states in which a request counts as failed.
UNRESOLVED = (DeadLetterState.DEAD, DeadLetterState.REPLAYING, DeadLetterState.DISCARDED)


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A failed request in the dead-letter queue.

    Attributes:
        request: The request with its latest failure and every earlier attempt.
        chunk: Number of the chunk.
        replay: Number of the latest replay that included it; None if there was none.
    """

    request: SettledRequest
    chunk: int
    state: DeadLetterState
    first_failed_at: float
    last_failed_at: float
    replay: int | None = None
    resolved_at: float | None = None
    discarded_at: float | None = None
    discard_reason: str | None = None


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """A filter for the dead letters of a batch; an empty field does not restrict.

    Attributes:
        limit: Maximum number of dead letters; the first ones in input order are selected.
    """

    codes: tuple[FailureCode, ...] = ()
    custom_ids: tuple[str, ...] = ()
    states: tuple[DeadLetterState, ...] = (DeadLetterState.DEAD,)
    limit: int | None = None


class Operation(msgspec.Struct, frozen=True, kw_only=True, tag_field="operation"):
    """An operation on dead letters of a batch. It is durable before the store reflects it.

    Attributes:
        number: Position among the batch's operations, from 1.
        indices: Indices of the requests, ascending.
        actor: Run or person that requested it.
    """

    batch_id: str
    number: int
    indices: tuple[int, ...]
    actor: str
    at: float


class Discard(Operation, frozen=True, kw_only=True, tag="discard"):
    """A decision to give dead letters up."""

    reason: str


class Replay(Operation, frozen=True, kw_only=True, tag="replay"):
    """A request to send dead letters through the engine again.

    Attributes:
        overrides: Fields of the body and their new values; null removes a field.
        force: Run even if settings differ from the plan's.
        request_key: Idempotency key: repeated requests with the same key are the same replay.
        closed_at: When the replay ended; requests without an outcome became dead again.
    """

    overrides: dict[str, Any] = {}
    force: bool = False
    request_key: str = ""
    closed_at: float | None = None


def after_replay(before: SettledRequest, replayed: SettledRequest) -> SettledRequest:
    """Return a dead letter's request with the outcome of its replay and its whole history.

    Args:
        before: The request before the replay.
        replayed: The request with outcome, attempts and provenance of the replay alone.
    """
    failure = before.outcome
    assert isinstance(failure, Failure)
    last = Attempt(at=before.settled_at, code=str(failure.code), message=failure.message)
    return msgspec.structs.replace(
        before,
        outcome=replayed.outcome,
        attempts=before.attempts + replayed.attempts,
        failed_attempts=(*before.failed_attempts, last, *replayed.failed_attempts),
        settled_at=replayed.settled_at,
        provenance=replayed.provenance,
        place=replayed.place,
    )
