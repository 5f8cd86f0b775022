"""Health: what is wrong with a deployment, how badly, and what helps."""

from collections.abc import Iterable
from enum import IntEnum

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


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found.

    Attributes:
        check: Its name, for example `disk`; of one run or device `worker:<run id>`, `gpu:0`.
        reason: A sentence with figures.
        next_command: What a person runs next; None if there is nothing to do.
        since: When this check began not to be healthy, POSIX seconds; None while it is, or where
            nobody looked before.
    """

    check: str
    level: Level
    reason: str
    next_command: str | None = None
    since: float | None = None


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
