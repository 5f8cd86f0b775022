"""Notifications: the alert transitions that are sent to people, and their text."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import msgspec

from batch_orchestration.operations.health.report import Finding, Level

#: Most transitions that are pending in full for a channel; older ones are counted.
MOST_PENDING = 100
#: Characters of a reason in a digest: a hundred of them stay within Slack's limit.
_PARAGRAPH = 240


class Change(StrEnum):
    """The kind of a transition."""

    RAISED = "alert"
    #: The alert persists.
    REMINDER = "still"
    RECOVERED = "recovered"


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """A change of an alert that is sent to people; `at` is the time at which it was noticed."""

    change: Change
    finding: Finding
    at: float

    @property
    def level(self) -> Level:
        """The level of the change: a recovery is healthy."""
        return Level.HEALTHY if self.change is Change.RECOVERED else self.finding.level

    @property
    def subject(self) -> str:
        """The transition in one line."""
        return f"[{self.change}] {self.finding.title}"

    @property
    def text(self) -> str:
        """The transition in full: reason, counts by code, link, next command."""
        found = self.finding
        if self.change is Change.RECOVERED:
            return f"{self.subject}\nIt was: {found.reason}"
        lines = [self.subject, found.reason]
        if found.counts:
            lines.append(", ".join(f"{code}: {count:,}" for code, count in found.counts.items()))
        lines += [f"Page: {found.link}"] if found.link else []
        lines += [f"Next: {found.next_command}"] if found.next_command else []
        return "\n".join(lines)

    @property
    def paragraph(self) -> str:
        """The transition as part of a digest: its reason may be cut, and it has no links."""
        reason = " ".join(self.finding.reason.split())
        cut = reason if len(reason) <= _PARAGRAPH else reason[: _PARAGRAPH - 1] + "…"
        return f"{self.subject}\n{cut}"


class Notification(msgspec.Struct, frozen=True, kw_only=True):
    """One notification: a single transition, or all that had to wait, oldest first.

    Attributes:
        left_out: Number of older transitions that are only counted, by kind.
    """

    transitions: tuple[Transition, ...] = ()
    left_out: Mapping[str, int] = {}

    @property
    def count(self) -> int:
        """Number of its transitions, those only counted included."""
        return len(self.transitions) + sum(self.left_out.values())

    @property
    def level(self) -> Level:
        """The worst level of its transitions."""
        return max((t.level for t in self.transitions), default=Level.DEGRADED)

    @property
    def subject(self) -> str:
        """The notification in one line."""
        if len(self.transitions) == self.count == 1:
            return self.transitions[0].subject
        return f"[digest] {self.count} alerts and recoveries that had to wait"

    @property
    def text(self) -> str:
        """The full text; a digest has one paragraph per transition."""
        if len(self.transitions) == self.count == 1:
            return self.transitions[0].text
        lines = [self.subject]
        if self.left_out:
            counts = ", ".join(f"{kind}: {count:,}" for kind, count in self.left_out.items())
            lines.append(f"Only counted, the log has them: {counts}")
        return "\n\n".join([*lines, *(transition.paragraph for transition in self.transitions)])

    def text_within(self, characters: int) -> str:
        """Return the text with as many of the newest transitions as fit; the others are counted."""
        text = self.text
        for most in range(len(self.transitions) - 1, 0, -1):
            if len(text) <= characters:
                break
            text = self.newest(most).text
        return text if len(text) <= characters else f"{text[: characters - 1]}…"

    def newest(self, most: int) -> "Notification":
        """Return a copy with at most `most` transitions in full; the older ones are counted."""
        first = max(0, len(self.transitions) - most)
        counted = Counter(self.left_out) + _by_kind(self.transitions[:first])
        return Notification(transitions=self.transitions[first:], left_out=dict(counted))

    def oldest(self, most: int) -> "Notification":
        """Return a copy without the transitions that have to wait for another notification."""
        return Notification(transitions=self.transitions[:most], left_out=self.left_out)

    def plus(self, transitions: Sequence[Transition]) -> "Notification":
        """Return a copy with the new transitions added; more than `MOST_PENDING` are counted."""
        every = Notification(transitions=(*self.transitions, *transitions), left_out=self.left_out)
        return every.newest(MOST_PENDING)

    def minus(self, sent: "Notification") -> "Notification":
        """Return the rest after another notification was sent.

        There may be new transitions, and some of those that were sent may only be counted by now.
        """
        counted_since = _by_kind(t for t in sent.transitions if t not in self.transitions)
        return Notification(
            transitions=tuple(t for t in self.transitions if t not in sent.transitions),
            left_out=dict(Counter(self.left_out) - Counter(sent.left_out) - counted_since),
        )


def _by_kind(transitions: Iterable[Transition]) -> Counter[str]:
    return Counter(str(transition.finding.kind) for transition in transitions)
