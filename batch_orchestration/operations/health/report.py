"""Findings: the problems of a deployment, their severity, and the next step.

Health checks and alert sources both produce them: an alert is a finding with a kind.
"""

from collections.abc import Iterable, Mapping
from enum import IntEnum, StrEnum
from typing import Any

import msgspec


class Level(IntEnum):
    """The health of a component; the worst finding decides."""

    HEALTHY = 0
    DEGRADED = 1
    UNHEALTHY = 2

    @property
    def word(self) -> str:
        """The level as a word: `healthy`, `degraded`, `unhealthy`."""
        return self.name.lower()

    @property
    def severity(self) -> str:
        """The urgency as alerts show it: `error` at once, `warning` by day, `info` never."""
        return ("info", "warning", "error")[self]


class AlertKind(StrEnum):
    """The subject of an alert. `docs/alerts.md` has the next steps; a test compares the two."""

    # Events of one batch or file, sent once.
    FILE_REJECTED = "file_rejected"
    BATCH_FAILED = "batch_failed"
    BATCH_OVER_BUDGET = "batch_over_budget"
    BATCH_EXPIRED = "batch_expired"
    ESTIMATE_MISSED = "estimate_missed"
    # Conditions: sent when they begin, repeatedly while they last, and when they are over.
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
    # About the alerts themselves.
    ALERTS_SILENT = "alerts_silent"
    ALERTS_LOST = "alerts_lost"
    TEST = "test"

    @property
    def is_event(self) -> bool:
        """Whether it happens once; a condition begins, lasts and ends."""
        return self in _EVENTS


_EVENTS = frozenset(
    {
        *(AlertKind.FILE_REJECTED, AlertKind.BATCH_FAILED, AlertKind.BATCH_OVER_BUDGET),
        *(AlertKind.BATCH_EXPIRED, AlertKind.ESTIMATE_MISSED, AlertKind.ALERTS_LOST),
    }
)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check, or the subject of an alert.

    Attributes:
        check: Its name, for example `disk`; for one run or device `worker:<run id>`, `gpu:0`.
            Alerts with the same name are one alert.
        reason: A sentence with figures.
        next_command: The next command for a person; None if there is nothing to do.
        since: When the check became unhealthy, or the event happened; None while it is healthy, or
            without an earlier check.
        kind: Of an alert.
        title: Of an alert: a short line, without figures that change.
        counts: Failed requests by code.
        link: A page of Dagster; None if none helps.
    """

    check: str
    level: Level
    reason: str
    next_command: str | None = None
    since: float | None = None
    kind: AlertKind | None = None
    title: str = ""
    counts: Mapping[str, int] = {}
    link: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values, its level as words."""
        words = {"level": self.level.word, "severity": self.level.severity}
        return {**msgspec.to_builtins(self), **words}


class Standstill(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the queue could be served and nothing is at work.

    Attributes:
        since: Time of the first check that found it so.
        entry: Id of the queue entry that is to be served next.
        pending: Its requests without an outcome.
    """

    since: float
    entry: str
    pending: int | None = None


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """All findings of one examination, the healthy ones included.

    Attributes:
        standstill: None while the queue moves, or no entry could be served.
    """

    at: float
    findings: tuple[Finding, ...]
    standstill: Standstill | None = None

    @property
    def level(self) -> Level:
        """The worst level; without any finding, unhealthy."""
        return max((finding.level for finding in self.findings), default=Level.UNHEALTHY)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are not healthy, the worst first."""
        found = (finding for finding in self.findings if finding.level is not Level.HEALTHY)
        return tuple(sorted(found, key=lambda finding: -finding.level))

    @property
    def summary(self) -> str:
        """The whole report in one line."""
        if not self.findings:
            return "unhealthy: nothing could be examined"
        reasons = "; ".join(f"{finding.check}: {finding.reason}" for finding in self.problems)
        return f"{self.level.word}: {reasons}" if reasons else self.level.word

    def problem_levels(self) -> frozenset[tuple[str, Level]]:
        """Return the part whose change is news: each unhealthy check and its level."""
        return frozenset((finding.check, finding.level) for finding in self.problems)


def dated(
    findings: Iterable[Finding], *, previous: HealthReport | None, now: float
) -> tuple[Finding, ...]:
    """Return the findings with the time since when each check is unhealthy."""
    before = {finding.check: finding for finding in (previous.findings if previous else ())}
    return tuple(_dated(finding, before.get(finding.check), now) for finding in findings)


def _dated(finding: Finding, before: Finding | None, now: float) -> Finding:
    if finding.level is Level.HEALTHY:
        return finding
    since = now if before is None or before.since is None else before.since
    return msgspec.structs.replace(finding, since=since)
