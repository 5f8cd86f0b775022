"""Health: what is wrong with a deployment, how badly, and what helps."""

from enum import IntEnum

import msgspec


class Level(IntEnum):
    """How well something is; the worst of its findings decides."""

    HEALTHY = 0
    DEGRADED = 1
    UNHEALTHY = 2


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found.

    Attributes:
        check: Its name, for example `disk`; of one run or device `worker:<run id>`, `gpu:0`.
        reason: A sentence with figures.
        next_command: What a person runs next; None if there is nothing to do.
    """

    check: str
    level: Level
    reason: str
    next_command: str | None = None


class HealthReport(msgspec.Struct, frozen=True, kw_only=True):
    """All findings of one look, the healthy ones included.

    Attributes:
        at: POSIX seconds.
    """

    at: float
    findings: tuple[Finding, ...]

    @property
    def level(self) -> Level:
        """The worst level found; nothing found at all is not healthy."""
        return max((finding.level for finding in self.findings), default=Level.UNHEALTHY)
