"""The context of the health checks, and functions that build their findings."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from batch_orchestration.engines.processes.records import is_running
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.operations.health.links import CLI
from batch_orchestration.operations.health.report import Finding, HealthReport, Level
from batch_orchestration.queue.entries import EntryState, QueueView
from batch_orchestration.settings import Settings
from batch_orchestration.store.store import Store
from batch_orchestration.workers.cleanup import worker_of
from batch_orchestration.workers.heartbeat import LastHeartbeat

#: `dispatch_sensor` writes `queue.json` every 5 s, and a tick may take a minute.
SLOW_SECONDS = 60.0
STATUS = f"{CLI} status"
HEALTH = f"{CLI} health"


@dataclass(frozen=True, kw_only=True)
class CheckContext:
    """The inputs of a check.

    Attributes:
        previous: The report before this one; None if there is no recent one.
    """

    settings: Settings
    folder: DataFolder
    store: Store
    now: float
    previous: HealthReport | None = None

    def before(self, check: str) -> Finding | None:
        """Return the previous finding of a check."""
        found = self.previous.findings if self.previous else ()
        return next((finding for finding in found if finding.check == check), None)


Check = Callable[[CheckContext], Iterable[Finding]]


def is_alive(last_heartbeat: LastHeartbeat, context: CheckContext) -> bool:
    """Whether a run shows heartbeats, whatever its progress."""
    silent = context.now - last_heartbeat.at > context.settings.silent_seconds
    return not silent and (
        last_heartbeat.heartbeat is None or is_running(worker_of(last_heartbeat.heartbeat))
    )


def running_in(view: QueueView) -> int:
    """Return the number of queue entries at work."""
    return sum(entry.state is EntryState.RUNNING for entry in view.entries)


def healthy(check: str, reason: str) -> Finding:
    """Return a finding without a problem."""
    return Finding(check=check, level=Level.HEALTHY, reason=reason)


def degraded(check: str, reason: str, next_command: str) -> Finding:
    """Return a finding that a person should look at by day."""
    return Finding(check=check, level=Level.DEGRADED, reason=reason, next_command=next_command)


def unhealthy(check: str, reason: str, next_command: str) -> Finding:
    """Return a finding about work that stands still or is about to, or about a failed check."""
    return Finding(check=check, level=Level.UNHEALTHY, reason=reason, next_command=next_command)
