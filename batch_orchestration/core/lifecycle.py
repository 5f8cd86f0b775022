"""The life of a batch: which status may follow which, its deadline, and how it is ended early."""

import re
from collections.abc import Mapping

import msgspec

from batch_orchestration.core.batches import DURATION, BatchPlan, BatchStatus
from batch_orchestration.core.errors import IllegalTransition
from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.results import BatchRecord

#: Every change of status that there is. Staying where one is changes nothing and is no change.
TRANSITIONS: Mapping[BatchStatus, frozenset[BatchStatus]] = {
    BatchStatus.VALIDATING: frozenset(
        {BatchStatus.IN_PROGRESS, BatchStatus.FAILED, BatchStatus.CANCELLED}
    ),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.CANCELLING}),
    #: To `cancelling`, because a decision to cancel may be older than the files that are written.
    BatchStatus.FINALIZING: frozenset(
        {BatchStatus.COMPLETED, BatchStatus.EXPIRED, BatchStatus.CANCELLING}
    ),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
    #: These two can be resumed.
    BatchStatus.CANCELLED: frozenset({BatchStatus.IN_PROGRESS}),
    BatchStatus.EXPIRED: frozenset({BatchStatus.IN_PROGRESS}),
    BatchStatus.COMPLETED: frozenset(),
    BatchStatus.FAILED: frozenset(),
}
#: Nothing more happens to a batch in one of these, unless a person resumes it.
FINAL = frozenset(
    {BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)
RESUMABLE = frozenset({BatchStatus.CANCELLED, BatchStatus.EXPIRED})
#: What is recorded for each request that an early end left unanswered.
UNASKED_CODES: Mapping[BatchStatus, FailureCode] = {
    BatchStatus.CANCELLED: FailureCode.BATCH_CANCELLED,
    BatchStatus.EXPIRED: FailureCode.BATCH_EXPIRED,
}
#: A hundred years; a longer window is as good as this one, and has no date that people could read.
LONGEST_WINDOW_SECONDS = 100 * 365 * 86400
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION_PART = re.compile(r"([0-9]+)([smhd])")


class BatchEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A batch came into a status: one line of its history.

    Attributes:
        at: POSIX seconds.
        from_status: None for the first one.
        actor: Run, person or sensor that brought it there.
    """

    at: float
    from_status: BatchStatus | None
    to_status: BatchStatus
    actor: str
    reason: str


class EarlyEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The decision to end a batch before every request is answered.

    Attributes:
        status: In which it will end: `cancelled` or `expired`.
        at: POSIX seconds.
        actor: Run, person or sensor that decided.
    """

    status: BatchStatus
    at: float
    actor: str
    reason: str

    @property
    def code(self) -> FailureCode:
        """What the requests without an answer fail with."""
        return UNASKED_CODES[self.status]

    def __str__(self) -> str:
        return f"{self.status} by {self.actor}" + (f": {self.reason}" if self.reason else "")


class Resumption(msgspec.Struct, frozen=True, kw_only=True):
    """The latest decision to go on with a batch that was paused or cancelled, or had expired.

    Attributes:
        at: POSIX seconds.
        actor: Run or person that decided.
        deadline: In place of the plan's, POSIX seconds; None leaves that in force.
        max_failure_rate: In place of the author's; None leaves that in force.
    """

    at: float
    actor: str
    reason: str = ""
    deadline: float | None = None
    max_failure_rate: float | None = None


def check_transition(old: BatchStatus, new: BatchStatus) -> None:
    """Raise `IllegalTransition` unless a batch may go from `old` to `new`, or stays."""
    if new is not old and new not in TRANSITIONS[old]:
        allowed = ", ".join(sorted(TRANSITIONS[old])) or "nothing"
        raise IllegalTransition(f"a batch that is {old} cannot become {new}, only {allowed}")


def times_after(times: Mapping[str, float], new: BatchStatus, at: float) -> dict[str, float]:
    """Return when each status was reached, after a legal change to `new`.

    A batch that is resumed has not ended: the times of what came after `in_progress` are dropped
    (the events keep them).
    """
    kept = dict(times)
    if new is BatchStatus.IN_PROGRESS:
        kept = {word: time for word, time in times.items() if word == BatchStatus.VALIDATING}
    return kept | {str(new): at}


def window_seconds(completion_window: str) -> int:
    """Return the length of a completion window such as `90s`, `24h`, `7d` or `1h30m`.

    Raises:
        ValueError: It is none.
    """
    if not re.search(DURATION, completion_window):
        raise ValueError(
            f"not a duration: {completion_window!r}; for example 90s, 30m, 24h, 7d or 1h30m"
        )
    parts = _DURATION_PART.findall(completion_window)
    total = sum(int(number) * _SECONDS[unit] for number, unit in parts)
    return min(total, LONGEST_WINDOW_SECONDS)


def deadline(batch: BatchPlan | BatchRecord, resumption: Resumption | None = None) -> float:
    """Return when the window of a batch ends, in POSIX seconds."""
    if resumption is not None and resumption.deadline is not None:
        return resumption.deadline
    return batch.created_at + window_seconds(batch.options.completion_window)


_NUMBER = re.compile(r"\d+")


class FailedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that failed.

    Attributes:
        index: Within the batch.
        custom_id: None where its line did not give one.
    """

    index: int
    custom_id: str | None = None
    code: str
    message: str

    @property
    def kind(self) -> tuple[str, str]:
        """Equal for requests that fail for one reason: numbers in the message do not count."""
        return self.code, _NUMBER.sub("#", self.message)


class Halt(msgspec.Struct, frozen=True, kw_only=True):
    """The decision to pause a batch, because too many of its requests fail.

    Attributes:
        at: POSIX seconds.
        actor: Run that decided.
        failed: Of the `judged` latest outcomes.
        alike: How many of these failed for the commonest reason.
        examples: Of that reason, the first of which words it.
        damaged: Why the decision cannot be read; it stands all the same.
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
        """What happened, as a sentence with the commonest reason."""
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
