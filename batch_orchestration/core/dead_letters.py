"""Dead letters: requests whose failure is final, and what people may do about them."""

from enum import StrEnum
from typing import Any

import msgspec

from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.core.results import Attempt, SettledRequest


class DeadLetterState(StrEnum):
    """Where a dead letter stands."""

    #: Its failure is final; a replay or a discard waits for a person.
    DEAD = "dead"
    #: A replay has it; until that has an outcome, the failure stands.
    REPLAYING = "replaying"
    #: A replay answered it: the answer is in `results` and in the output file.
    RESOLVED = "resolved"
    #: A person gave it up, with a reason. It stays in the error file.
    DISCARDED = "discarded"


#: The states in which a request counts as failed.
UNRESOLVED = (DeadLetterState.DEAD, DeadLetterState.REPLAYING, DeadLetterState.DISCARDED)


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A failed request in the queue.

    Attributes:
        request: With its latest failure and every attempt before it.
        chunk: Number of its chunk.
        replay: Number of the latest replay that had it.
        first_failed_at: POSIX seconds, as are all times here.
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


class DeadLetterEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter came into a state: one line of its history.

    Attributes:
        actor: Run or person that brought it there.
        operation: Number of the replay or discard; None for the failure of a run.
        code: Of the failure, where there was one.
        reason: Message of a failure, reason of a discard, overrides of a replay.
    """

    index: int
    at: float
    state: DeadLetterState
    actor: str
    operation: int | None
    code: str | None
    reason: str
    engine: str
    settings_hash: str


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which dead letters of a batch are meant; whatever is empty does not restrict.

    Attributes:
        limit: So many at most, the first in input order.
    """

    codes: tuple[FailureCode, ...] = ()
    custom_ids: tuple[str, ...] = ()
    states: tuple[DeadLetterState, ...] = (DeadLetterState.DEAD,)
    limit: int | None = None


class Operation(msgspec.Struct, frozen=True, kw_only=True, tag_field="operation"):
    """What was done to dead letters of a batch. It is durable before the store is told.

    Attributes:
        number: Place in the order of the batch's operations, from 1.
        indices: Of the requests, ascending.
        actor: Run or person that asked for it.
        at: POSIX seconds.
    """

    batch_id: str
    number: int
    indices: tuple[int, ...]
    actor: str
    at: float


class Discard(Operation, frozen=True, kw_only=True, tag="discard"):
    """Dead letters were given up."""

    reason: str


class Replay(Operation, frozen=True, kw_only=True, tag="replay"):
    """Dead letters are sent through the engine again.

    Attributes:
        overrides: Fields of the body and their new values; null removes a field.
        force: Go on although settings differ from those of the plan.
        request_key: Who asks again with the same key asks for the same replay.
        closed_at: When it was over; what had no outcome then is dead again.
    """

    overrides: dict[str, Any] = {}
    force: bool = False
    request_key: str = ""
    closed_at: float | None = None


def after_replay(before: SettledRequest, replayed: SettledRequest) -> SettledRequest:
    """Return a dead letter's request with the outcome of its replay, and the whole history.

    Args:
        before: As it was when it was replayed.
        replayed: Outcome, attempts and provenance of the replay alone.
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
