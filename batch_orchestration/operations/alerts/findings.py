"""The rules for alerts from health findings: from which level on, and after how long."""

import contextlib
import math
from collections.abc import Iterator

from msgspec.structs import replace

from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.text import duration
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.alerts.state import AlertState, Observation
from batch_orchestration.operations.health.links import health_link, run_link, sensor_link
from batch_orchestration.operations.health.report import AlertKind, Finding, HealthReport, Level
from batch_orchestration.settings import Settings
from batch_orchestration.workers.heartbeat_files import read_last_heartbeat

#: `health_sensor` runs every 30 s, and a tick may take a minute.
HEALTH_STALE_SECONDS = 150.0
#: A report further in the future was written before the clock was set back.
CLOCK_SECONDS = 60.0

#: By the check's name, up to a colon: the alert's kind and title, the lowest level that raises it,
#: and the seconds for which it must last. A problem that mends itself sooner raises no alert.
_RULES = {
    # A deployment that was just started has not ticked yet.
    "dagster": (
        AlertKind.DISPATCH_STOPPED,
        "No batch is served: dispatch_sensor completes no tick",
        *(Level.UNHEALTHY, 60.0),
    ),
    # One slow read is no incident; a damaged store can wait a minute.
    "store": (AlertKind.STORE_UNUSABLE, "The store cannot be used", Level.UNHEALTHY, 60.0),
    "disk": (AlertKind.DISK_LOW, "The disk is nearly full", Level.DEGRADED, 0.0),
    "queue": (AlertKind.QUEUE_STALLED, "The queue is stalled", Level.UNHEALTHY, 0.0),
    # By then the worker should have been ended and started again.
    "worker": (AlertKind.BATCH_STUCK, "A run is stuck", Level.UNHEALTHY, 120.0),
    "engine": (AlertKind.ENGINE_SILENT, "The engine does not answer", Level.UNHEALTHY, 60.0),
    "gpu": (AlertKind.GPU_UNHEALTHY, "The GPU is unhealthy", Level.UNHEALTHY, 0.0),
    "person": (AlertKind.NEEDS_PERSON, "A batch waits for a person", Level.DEGRADED, 0.0),
}
_RESTARTS = (
    AlertKind.ENGINE_RESTARTS,
    "The engine restarts again and again",
    *(Level.DEGRADED, 0.0),
)
#: For a check that is not listed.
_OTHER = (AlertKind.HEALTH_UNKNOWN, "A health check could not be done", Level.UNHEALTHY, 0.0)
#: The kinds that are unknown without a report.
FROM_HEALTH = frozenset(kind for kind, *_ in (*_RULES.values(), _RESTARTS, _OTHER))


def from_health(
    settings: Settings, folder: DataFolder, state: AlertState, now: float
) -> Observation:
    """Return the findings of the last health report; a missing or stale report is an alert, too."""
    report, problem = None, "there is no report yet"
    try:
        report = StateFile(folder.health, HealthReport).read()
    except StorageError as error:
        problem = str(error)
    age = math.inf if report is None else now - report.at
    if report is not None and -CLOCK_SECONDS <= age <= HEALTH_STALE_SECONDS:
        return Observation(findings=list(_of_report(report, settings, folder)))
    if now - state.began <= HEALTH_STALE_SECONDS:
        return Observation(unknown=FROM_HEALTH)
    if report is not None:
        problem = f"the last report is {duration(age)} old"
        if age < 0:
            problem = f"the last report is {duration(-age)} from the future"
    alert = Finding(
        check="health",
        level=Level.UNHEALTHY,
        reason=f"{problem}: health_sensor is stopped or fails",
        kind=AlertKind.HEALTH_UNKNOWN,
        title="The health of the deployment is unknown",
        link=sensor_link(settings, "health_sensor"),
        next_command="python -m batch_orchestration health",
    )
    return Observation(findings=[alert], unknown=FROM_HEALTH)


def _of_report(report: HealthReport, settings: Settings, folder: DataFolder) -> Iterator[Finding]:
    for finding in report.problems:
        family, _, about = finding.check.partition(":")
        rule = _RULES.get(family, _OTHER)
        if finding.check.startswith("engine:") and finding.level is Level.DEGRADED:
            rule = _RESTARTS
        kind, title, level, lasts = rule
        if finding.level < level or report.at - (finding.since or report.at) < lasts:
            continue
        link = health_link(settings)
        if about and family in ("worker", "engine"):
            about, link = _batch_of(about, folder) or f"run {about[:8]}", run_link(settings, about)
        if kind is AlertKind.NEEDS_PERSON:
            link = finding.next_command or link
        yield replace(
            finding,
            # The batch's next run continues the alert: neither a recovery nor a new alert.
            check=f"{kind}:{about if rule is _RESTARTS else finding.check}",
            kind=kind,
            title=f"{title}: {about}" if about else title,
            link=link,
            next_command=None if finding.next_command == link else finding.next_command,
        )


def _batch_of(run_id: str, folder: DataFolder) -> str | None:
    """Return the batch that a run works on, according to its heartbeat."""
    with contextlib.suppress(OSError):
        last_heartbeat = read_last_heartbeat(folder.heartbeat_path(run_id))
        if last_heartbeat is not None and last_heartbeat.heartbeat is not None:
            return last_heartbeat.heartbeat.batch_id
    return None
