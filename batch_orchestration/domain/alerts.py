"""Alerts: what a person is told without having asked, and in which words."""

from collections import Counter
from collections.abc import Mapping
from enum import StrEnum

import msgspec

#: Characters of a cause in a digest: with a hundred of them it stays within what Slack takes.
_PARAGRAPH = 240


class AlertKind(StrEnum):
    """What an alert is about. `docs/alerts.md` says of each what to do; a test compares the two."""

    # Of one batch, told once.
    FILE_REJECTED = "file_rejected"
    BATCH_FAILED = "batch_failed"
    BATCH_OVER_BUDGET = "batch_over_budget"
    BATCH_EXPIRED = "batch_expired"
    ESTIMATE_MISSED = "estimate_missed"
    # Conditions: told when they begin, now and then while they last, and when they are over.
    BATCH_STUCK = "batch_stuck"
    NEEDS_PERSON = "needs_person"
    BATCH_LATE = "batch_late"
    DEAD_LETTERS = "dead_letters"
    ENGINE_RESTARTS = "engine_restarts"
    ENGINE_SILENT = "engine_silent"
    GPU_UNHEALTHY = "gpu_unhealthy"
    QUEUE_STALLED = "queue_stalled"
    DISK_LOW = "disk_low"
    STORE_UNUSABLE = "store_unusable"
    DISPATCH_STOPPED = "dispatch_stopped"
    HEALTH_UNKNOWN = "health_unknown"
    # About alerts themselves.
    ALERTS_SILENT = "alerts_silent"
    ALERTS_LOST = "alerts_lost"
    TEST = "test"


class Severity(StrEnum):
    """How soon somebody should look."""

    #: Something stands still, or is lost.
    ERROR = "error"
    #: By day.
    WARNING = "warning"
    #: Nothing is to be done.
    INFO = "info"


class Alert(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a person should know.

    Attributes:
        key: What it is about: of alerts with one key there is one.
        title: A short line, without figures that change.
        cause: What was seen, with figures.
        counts: Of failed requests, by code.
        link: A page of Dagster; None if none helps.
        next_command: What a person runs next.
    """

    key: str
    kind: AlertKind
    severity: Severity
    title: str
    cause: str
    counts: Mapping[str, int] = {}
    link: str | None = None
    next_command: str | None = None


class News(StrEnum):
    """What about an alert is told."""

    RAISED = "alert"
    #: It lasts.
    REMINDER = "still"
    RECOVERED = "recovered"


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """An alert, told.

    Attributes:
        at: When it was decided to tell it, POSIX seconds.
        since: When the alert was raised.
    """

    news: News
    alert: Alert
    at: float
    since: float

    @property
    def severity(self) -> Severity:
        """Of the news: that something is over is no error."""
        return Severity.INFO if self.news is News.RECOVERED else self.alert.severity

    @property
    def subject(self) -> str:
        """It in one line."""
        return f"[{self.news}] {self.alert.title}"

    @property
    def text(self) -> str:
        """It in full: cause, counts by code, link, next command."""
        alert, lines = self.alert, [self.subject, self.alert.cause]
        if self.news is News.RECOVERED:
            return f"{self.subject}\nIt was: {alert.cause}"
        if alert.counts:
            lines.append(", ".join(f"{code}: {count:,}" for code, count in alert.counts.items()))
        lines += [f"Page: {alert.link}"] if alert.link else []
        lines += [f"Next: {alert.next_command}"] if alert.next_command else []
        return "\n".join(lines)

    @property
    def paragraph(self) -> str:
        """It as one of many: its cause may be cut, and links are left to those who look."""
        cause = " ".join(self.alert.cause.split())
        cut = cause if len(cause) <= _PARAGRAPH else cause[: _PARAGRAPH - 1] + "…"
        return f"{self.subject}\n{cut}"


class Post(msgspec.Struct, frozen=True, kw_only=True):
    """What a channel sends at a time: one message, or all that had to wait.

    Attributes:
        left_out: How many older messages are only counted, by kind.
    """

    messages: tuple[Message, ...]
    left_out: Mapping[str, int] = {}

    @property
    def severity(self) -> Severity:
        """The worst of its messages."""
        order = (Severity.ERROR, Severity.WARNING, Severity.INFO)
        return min((m.severity for m in self.messages), key=order.index, default=Severity.WARNING)

    @property
    def subject(self) -> str:
        """It in one line."""
        if len(self.messages) == 1 and not self.left_out:
            return self.messages[0].subject
        total = len(self.messages) + sum(self.left_out.values())
        return f"[digest] {total} alerts and recoveries that had to wait"

    @property
    def text(self) -> str:
        """All of it; of a digest one paragraph per message, oldest first."""
        if len(self.messages) == 1 and not self.left_out:
            return self.messages[0].text
        lines = [self.subject]
        if self.left_out:
            counts = ", ".join(f"{kind}: {count:,}" for kind, count in self.left_out.items())
            lines.append(f"Only counted, the log has them: {counts}")
        return "\n\n".join([*lines, *(message.paragraph for message in self.messages)])

    def text_within(self, characters: int) -> str:
        """Return it with as many of its newest messages as find room; others are only counted."""
        text = self.text
        for first in range(1, len(self.messages)):
            if len(text) <= characters:
                break
            counted = Counter(self.left_out)
            counted.update(str(message.alert.kind) for message in self.messages[:first])
            text = Post(messages=self.messages[first:], left_out=counted).text
        return text if len(text) <= characters else f"{text[: characters - 1]}…"
