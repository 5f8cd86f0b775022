"""The life cycle of a batch: status transitions, deadlines, early ends, resumptions and pauses."""

import re
from collections.abc import Mapping

import msgspec

from batch_orchestration.core.batches import DURATION, BatchPlan, BatchStatus
from batch_orchestration.core.errors import IllegalTransition
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.results import BatchRecord

#: All legal status changes. Keeping the same status is always allowed and not listed.
TRANSITIONS: Mapping[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset(
        {BatchStatus.IN_PROGRESS, BatchStatus.FAILED, BatchStatus.CANCELLED}
    ),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.CANCELLING}),
    #: `cancelling` is allowed because the cancellation may predate the files being written.
    BatchStatus.FINALIZING: frozenset(
        {BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLING}
    ),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
    #: Resumption leads from these two back to `in_progress`.
    BatchStatus.CANCELLED: frozenset({BatchStatus.IN_PROGRESS}),
    BatchStatus.EXPIRED: frozenset({BatchStatus.IN_PROGRESS}),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.FAILED: frozenset(),
}
#: A batch with one of these statuses does not change unless a person resumes it.
FINAL = frozenset(
    {BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)
RESUMABLE = frozenset({BatchStatus.CANCELLED, BatchStatus.EXPIRED})
#: Failure code of each request that an early end left unanswered.
UNASKED_CODES: Mapping[BatchStatus, FailureCode] = {
    BatchStatus.CANCELLED: FailureCode.BATCH_CANCELLED,
    BatchStatus.EXPIRED: FailureCode.BATCH_EXPIRED,
}
#: A hundred years. Longer windows are cut to this: their deadlines have no readable date.
LONGEST_WINDOW_SECONDS = 100 * 365 * 86400
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION_PART = re.compile(r"([0-9]+)([smhd])")


class BatchEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A change of a batch's status: one entry of its history.

    Attributes:
        from_status: None for the first event.
        actor: Run, person or sensor that caused the change.
    """

    at: float
    from_status: BatchStatus | None
    to_status: BatchStatus
    actor: str
    reason: str


class EarlyEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The decision to end a batch before every request is answered.

    Attributes:
        status: The final status: `cancelled` or `expired`.
        actor: Run, person or sensor that decided.
    """

    status: BatchStatus
    at: float
    actor: str
    reason: str

    @property
    def code(self) -> FailureCode:
        """Failure code of the requests without an answer."""
        return UNASKED_CODES[self.status]

    def __str__(self) -> str:
        return f"{self.status} by {self.actor}" + (f": {self.reason}" if self.reason else "")


class Resumption(msgspec.Struct, frozen=True, kw_only=True):
    """The latest decision to resume a batch that was paused, cancelled or expired.

    Attributes:
        actor: Run or person that decided.
        deadline: Replaces the plan's deadline; None keeps it.
        max_failure_rate: Replaces the author's value; None keeps it.
    """

    at: float
    actor: str
    reason: str = ""
    deadline: float | None = None
    max_failure_rate: float | None = None


def check_transition(old: BatchStatus, new: BatchStatus) -> None:
    """Raise `IllegalTransition` unless `new` equals `old` or may follow it."""
    if new is not old and new not in TRANSITIONS[old]:
        allowed = ", ".join(sorted(TRANSITIONS[old])) or "nothing"
        raise IllegalTransition(f"a batch that is {old} cannot become {new}, only {allowed}")


def times_after(times: Mapping[str, float], new: BatchStatus, at: float) -> dict[str, float]:
    """Return the time of each status after a legal change to `new`.

    A resumed batch has not ended: the change to `in_progress` drops the times of all later
    statuses. The batch's events keep them.
    """
    kept = dict(times)
    if new is BatchStatus.IN_PROGRESS:
        kept = {word: time for word, time in times.items() if word == BatchStatus.VALIDATING}
    return kept | {str(new): at}


def window_seconds(completion_window: str) -> int:
    """Return the length of a completion window such as `90s`, `24h`, `7d` or `1h30m`.

    Raises:
        ValueError: The text is not a duration.
    """
    if not re.search(DURATION, completion_window):
        raise ValueError(
            f"not a duration: {completion_window!r}; for example 90s, 30m, 24h, 7d or 1h30m"
        )
    parts = _DURATION_PART.findall(completion_window)
    total = sum(int(number) * _SECONDS[unit] for number, unit in parts)
    return min(total, LONGEST_WINDOW_SECONDS)


def deadline(batch: BatchPlan | BatchRecord, resumption: Resumption | None = None) -> float:
    """Return the end of a batch's completion window."""
    if resumption is not None and resumption.deadline is not None:
        return resumption.deadline
    return batch.created_at + window_seconds(batch.options.completion_window)


_NUMBER = re.compile(r"\d+")


class FailedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A failed request, as judged for a `Halt`.

    Attributes:
        index: Position in the batch.
        custom_id: None if the line has none.
    """

    index: int
    custom_id: str | None = None
    code: str
    message: str

    @property
    def kind(self) -> tuple[str, str]:
        """Key that is equal for failures with the same cause; numbers in messages are ignored."""
        return self.code, _NUMBER.sub("#", self.message)


class Halt(msgspec.Struct, frozen=True, kw_only=True):
    """The decision to pause a batch because too many of its requests fail.

    Attributes:
        actor: Run that decided.
        failed: Number of failures among the `judged` latest outcomes.
        alike: Number of these failures with the most frequent cause.
        examples: Failures with that cause; the first one words `reason`.
        damaged: Why the file of the decision cannot be read; the batch is paused regardless.
    """

    at: float
    actor: str
    failed: int
    judged: int
    max_failure_rate: float
    alike: int
    examples: tuple[FailedRequest, ...]
    damaged: str | None = None

    @property
    def reason(self) -> str:
        """The reason for the pause as a sentence, with the most frequent cause."""
        if self.damaged is not None:
            return self.damaged
        counted = (
            f"{self.failed} of its latest {self.judged} requests failed, more than"
            f" {self.max_failure_rate:.0%} (max_failure_rate)"
        )
        if not self.examples:
            return counted
        first = self.examples[0]
        return f"{counted}; {self.alike} of them as {first.code}: {first.message}"

    def __str__(self) -> str:
        return f"paused: {self.reason}"
