"""Decides whether a batch pauses because too many requests fail, as after one wrong parameter.

Outcomes are judged in the order of their arrival: all of them once `FIRST_OUTCOMES` have arrived,
and later only the latest `LATEST_OUTCOMES`. Attempts that are retried are not outcomes, and lines
rejected at admission were never requests.
"""

from collections import Counter, deque
from collections.abc import Iterable

from batch_orchestration.core.lifecycle import FailedRequest, Halt
from batch_orchestration.core.outcomes import Failure

#: Fewer outcomes are not judged, so a batch with fewer requests never pauses.
FIRST_OUTCOMES = 20
#: A streak of failures exceeds the default rate after about half as many, wherever it begins.
LATEST_OUTCOMES = 100
EXAMPLES = 3
#: An engine's message may fill a page.
_MESSAGE_LENGTH = 300


class FailureRate:
    """The latest outcomes of a batch, compared with the share of them that may fail.

    Args:
        most: Share of failures, 0 to 1, up to which the batch goes on; 1 never pauses it.
        earlier: Earlier outcomes, in order; None for an answer.
    """

    def __init__(self, most: float, earlier: Iterable[FailedRequest | None] = ()) -> None:
        self._most = most
        self._latest = deque(earlier, maxlen=LATEST_OUTCOMES)

    def record(self, outcome: FailedRequest | None) -> None:
        """Add an outcome; None for an answer."""
        self._latest.append(outcome)

    @property
    def is_exceeded(self) -> bool:
        """Whether the share of failures among the latest outcomes is too high."""
        judged = len(self._latest)
        return judged >= FIRST_OUTCOMES and len(self._failed) > self._most * judged

    def halt(self, *, at: float, actor: str) -> Halt:
        """Return the decision to pause the batch, with examples of the most common failure."""
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
    """Return a failed request with a message that can be stored: short, one line, Unicode."""
    message = " ".join(failure.message.encode("utf-8", "replace").decode().split())
    if len(message) > _MESSAGE_LENGTH:
        message = message[: _MESSAGE_LENGTH - 1] + "…"
    return FailedRequest(index=index, custom_id=custom_id, code=str(failure.code), message=message)
