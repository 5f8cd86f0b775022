"""Whether so many of a batch's requests fail that it pauses: one wrong parameter fails them all.

Judged are outcomes in the order in which they arrive: over the first `FIRST_OUTCOMES` of them, and
then over the latest `LATEST_OUTCOMES`. Attempts that another one follows are no outcomes, and what
admission refused never was a request.
"""

from collections import Counter, deque
from collections.abc import Iterable

from batch_orchestration.core.lifecycle import FailedRequest, Halt
from batch_orchestration.core.outcomes import Failure

#: Nothing is judged before: a batch with fewer requests never pauses.
FIRST_OUTCOMES = 20
#: So many failures in a row, or nearly, show within half as many outcomes, wherever they begin.
LATEST_OUTCOMES = 100
EXAMPLES = 3
#: What an engine says may be a page.
_MESSAGE_LENGTH = 300


class FailureRate:
    """The latest outcomes of a batch, against the share of them that may fail.

    Args:
        most: Share of failures, 0 to 1, up to which the batch goes on; 1 never pauses it.
        earlier: Outcomes before, in order: None for an answer.
    """

    def __init__(self, most: float, earlier: Iterable[FailedRequest | None] = ()) -> None:
        self._most = most
        self._latest = deque(earlier, maxlen=LATEST_OUTCOMES)

    def record(self, outcome: FailedRequest | None) -> None:
        """Take in one more outcome; None for an answer."""
        self._latest.append(outcome)

    @property
    def is_exceeded(self) -> bool:
        """Whether more of the latest outcomes are failures than may be."""
        judged = len(self._latest)
        return judged >= FIRST_OUTCOMES and len(self._failed) > self._most * judged

    def halt(self, *, at: float, actor: str) -> Halt:
        """Return the decision to pause the batch, with the commonest reason and its examples."""
        failed = self._failed
        kinds = Counter(one.kind for one in failed)
        kind, alike = max(kinds.items(), key=lambda item: item[1], default=(("", ""), 0))
        return Halt(
            at=at,
            actor=actor,
            failed=len(failed),
            judged=len(self._latest),
            max_failure_rate=self._most,
            alike=alike,
            examples=tuple(one for one in failed if one.kind == kind)[:EXAMPLES],
        )

    @property
    def _failed(self) -> list[FailedRequest]:
        return [outcome for outcome in self._latest if outcome is not None]


def failed_request(index: int, custom_id: str | None, failure: Failure) -> FailedRequest:
    """Return a failed request in words that can be kept: short, on one line, in Unicode."""
    message = " ".join(failure.message.encode("utf-8", "replace").decode().split())
    if len(message) > _MESSAGE_LENGTH:
        message = message[: _MESSAGE_LENGTH - 1] + "…"
    return FailedRequest(index=index, custom_id=custom_id, code=str(failure.code), message=message)
