"""Which findings of the health are alerts, from which level on, and after how long."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

from batch_orchestration.domain.alert_book import AlertBook, Seen
from batch_orchestration.domain.alerts import Alert, AlertKind, Severity
from batch_orchestration.domain.errors import StorageError
from batch_orchestration.domain.health import Finding, HealthReport, Level
from batch_orchestration.services.dagster_links import health_link, run_link, sensor_link
from batch_orchestration.services.wording import duration
from batch_orchestration.settings import Settings
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.health_files import read_health
from batch_orchestration.storage.heartbeat_files import read_pulse

#: `health_sensor` looks every 30 s, and a tick may take a minute.
HEALTH_STALE_SECONDS = 150.0
#: A report that is further in the future was written before the clock was set back.
CLOCK_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Of which kind an ill check is an alert.

    Attributes:
        level: From which on.
        lasts: For how long it must have been ill: what mends itself within that is none.
    """

    kind: AlertKind
    level: Level
    title: str
    lasts: float = 0.0


#: By the check's name, up to a colon. A check that is not here is `health_unknown`.
_RULES = {
    "dagster": _Rule(
        kind=AlertKind.DISPATCH_STOPPED,
        level=Level.UNHEALTHY,
        title="No batch is served: dispatch_sensor does not tick",
        lasts=60.0,  # a deployment that was just started has not ticked yet
    ),
    "store": _Rule(
        kind=AlertKind.STORE_UNUSABLE,
        level=Level.UNHEALTHY,
        title="The store cannot be used",
        lasts=60.0,  # one slow look is no accident; to a damaged one a minute does nothing
    ),
    "disk": _Rule(kind=AlertKind.DISK_LOW, level=Level.DEGRADED, title="The disk is nearly full"),
    "queue": _Rule(
        kind=AlertKind.QUEUE_STALLED, level=Level.UNHEALTHY, title="The queue does not move"
    ),
    "worker": _Rule(
        kind=AlertKind.BATCH_STUCK,
        level=Level.UNHEALTHY,
        title="A run is stuck",
        lasts=120.0,  # by then it was to be ended and started again
    ),
    "engine": _Rule(
        kind=AlertKind.ENGINE_SILENT,
        level=Level.UNHEALTHY,
        title="The engine does not answer",
        lasts=60.0,
    ),
    "gpu": _Rule(kind=AlertKind.GPU_UNHEALTHY, level=Level.UNHEALTHY, title="The GPU is unhealthy"),
    "person": _Rule(
        kind=AlertKind.NEEDS_PERSON, level=Level.DEGRADED, title="A batch waits for a person"
    ),
}
_RESTARTS = _Rule(
    kind=AlertKind.ENGINE_RESTARTS,
    level=Level.DEGRADED,
    title="The engine is started again and again",
)
_OTHER = _Rule(
    kind=AlertKind.HEALTH_UNKNOWN, level=Level.UNHEALTHY, title="A part of the health is not known"
)
#: What is not known while there is no report.
FROM_HEALTH = frozenset({r.kind for r in _RULES.values()} | {_RESTARTS.kind, _OTHER.kind})


def from_health(settings: Settings, folder: DataFolder, book: AlertBook, now: float) -> Seen:
    """Return what the last health report tells; that there is none of late is a condition, too."""
    report, problem = None, "health_sensor has written none yet"
    try:
        report = read_health(folder)
    except StorageError as error:
        problem = str(error)
    age = math.inf if report is None else now - report.at
    if report is not None and -CLOCK_SECONDS <= age <= HEALTH_STALE_SECONDS:
        return Seen(conditions=list(_of_report(report, settings, folder)), cursor=now)
    if now - book.began <= HEALTH_STALE_SECONDS:
        return Seen(unknown=FROM_HEALTH, cursor=now)
    if report is not None:
        problem = f"the last report is of {duration(age)} ago"
    alert = Alert(
        key="health",
        kind=AlertKind.HEALTH_UNKNOWN,
        severity=Severity.ERROR,
        title="Nobody knows whether the deployment is well",
        cause=f"{problem}: health_sensor was stopped, or fails",
        link=sensor_link(settings, "health_sensor"),
        next_command="python -m batch_orchestration health",
    )
    unknown = FROM_HEALTH - {AlertKind.HEALTH_UNKNOWN}
    return Seen(conditions=[alert], unknown=unknown, cursor=now)


def _of_report(report: HealthReport, settings: Settings, folder: DataFolder) -> Iterator[Alert]:
    for finding in report.problems:
        family, _, about = finding.check.partition(":")
        rule = _RULES.get(family, _OTHER)
        if finding.check.startswith("engine:") and finding.level is Level.DEGRADED:
            rule = _RESTARTS
        lasted = report.at - (finding.since or report.at)
        if finding.level >= rule.level and lasted >= rule.lasts:
            yield _of_finding(finding, rule, about, settings, folder)


def _of_finding(
    finding: Finding, rule: _Rule, about: str, settings: Settings, folder: DataFolder
) -> Alert:
    named, link = about, health_link(settings)
    if about and finding.check.startswith(("worker:", "engine:")):
        named, link = _batch_of(about, folder) or f"run {about[:8]}", run_link(settings, about)
    if rule.kind is AlertKind.NEEDS_PERSON:
        link = finding.next_command or link
    return Alert(
        # The next run of the batch goes on with it: that is neither its end nor another.
        key=f"{rule.kind}:{named if rule is _RESTARTS else finding.check}",
        kind=rule.kind,
        severity=Severity.ERROR if finding.level is Level.UNHEALTHY else Severity.WARNING,
        title=f"{rule.title}: {named}" if named else rule.title,
        cause=finding.reason,
        link=link,
        next_command=None if finding.next_command == link else finding.next_command,
    )


def _batch_of(run_id: str, folder: DataFolder) -> str | None:
    """Return the batch that a run has in hand, as far as its heartbeat tells."""
    with contextlib.suppress(OSError):
        pulse = read_pulse(folder.heartbeat_path(run_id))
        if pulse is not None and pulse.heartbeat is not None:
            return pulse.heartbeat.batch_id
    return None
