"""Findings: what is wrong with a deployment, how badly, and what helps.

Checks of the health find them, and so do the sources of alerts: an alert is a finding with a kind.
"""

from collections.abc import Iterable, Mapping
from enum import IntEnum, StrEnum

import msgspec


class Level(IntEnum):
    """How well something is; the worst of its findings decides."""

    HEALTHY = 0
    DEGRADED = 1
    UNHEALTHY = 2

    @property
    def word(self) -> str:
        """It as a word: `healthy`, `degraded`, `unhealthy`."""
        return self.name.lower()

    @property
    def severity(self) -> str:
        """How soon somebody should look, as an alert says it: at once, by day, never."""
        return ("info", "warning", "error")[self]


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

    @property
    def is_event(self) -> bool:
        """Whether it happens once; what does not begins, lasts and ends."""
        return self in _EVENTS


_EVENTS = frozenset(
    {
        *(AlertKind.FILE_REJECTED, AlertKind.BATCH_FAILED, AlertKind.BATCH_OVER_BUDGET),
        *(AlertKind.BATCH_EXPIRED, AlertKind.ESTIMATE_MISSED, AlertKind.ALERTS_LOST),
    }
)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found, or what people are alerted to.

    Attributes:
        check: Its name, for example `disk`; of one run or device `worker:<run id>`, `gpu:0`. Of the
            alerts with one name there is one.
        reason: A sentence with figures.
        next_command: What a person runs next; None if there is nothing to do.
        since: When this check began not to be healthy, or when the event happened, POSIX seconds;
            None while it is healthy, or where nobody looked before.
        kind: Of an alert.
        title: Of an alert: a short line, without figures that change.
        counts: Of failed requests, by code.
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


class Standstill(msgspec.Struct, frozen=True, kw_only=True):
    """Something could be worked at and nothing is.

    Attributes:
        since: POSIX seconds of the look at which it was first seen so.
        entry: Of the queue: what is to be served next.
        pending: Its requests without an outcome.
    """

    since: float
    entry: str
    pending: int | None = None


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """All findings of one look, the healthy ones included.

    Attributes:
        at: POSIX seconds.
        standstill: None while the queue moves, or nothing in it could.
    """

    at: float
    findings: tuple[Finding, ...]
    standstill: Standstill | None = None

    @property
    def level(self) -> Level:
        """The worst level found; nothing found at all is not healthy."""
        return max((finding.level for finding in self.findings), default=Level.UNHEALTHY)

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that are not healthy, the worst first."""
        found = (finding for finding in self.findings if finding.level is not Level.HEALTHY)
        return tuple(sorted(found, key=lambda finding: -finding.level))

    @property
    def verdict(self) -> str:
        """All of it in one line, for people."""
        if not self.findings:
            return "unhealthy: nothing could be looked at"
        reasons = "; ".join(f"{finding.check}: {finding.reason}" for finding in self.problems)
        return f"{self.level.word}: {reasons}" if reasons else self.level.word

    def told_of(self) -> frozenset[tuple[str, Level]]:
        """Return what of it is news when it changes: how bad which checks are, no figures."""
        return frozenset((finding.check, finding.level) for finding in self.problems)


def dated(
    findings: Iterable[Finding], *, previous: HealthReport | None, now: float
) -> tuple[Finding, ...]:
    """Return the findings with the time since when each check is not healthy."""
    before = {finding.check: finding for finding in (previous.findings if previous else ())}
    return tuple(_dated(finding, before.get(finding.check), now) for finding in findings)


def _dated(finding: Finding, before: Finding | None, now: float) -> Finding:
    if finding.level is Level.HEALTHY:
        return finding
    since = now if before is None or before.since is None else before.since
    return msgspec.structs.replace(finding, since=since)
