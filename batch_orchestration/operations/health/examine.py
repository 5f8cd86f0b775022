"""Health: how a deployment is, found out from its data folder, its settings and its store alone.

Fails closed. A check that raises, that does not answer in time or that finds nothing to say is an
unhealthy finding with its name; what cannot be looked at is never taken for healthy.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.operations.health.checks import CHECKS, standstill
from batch_orchestration.operations.health.context import Check, CheckContext
from batch_orchestration.operations.health.report import (
    Finding,
    HealthReport,
    Level,
    Standstill,
    dated,
)
from batch_orchestration.operations.health.report_file import read_health
from batch_orchestration.settings import Settings
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)

#: For all checks together, which run side by side. A tick of a sensor has 60 s.
LOOK_SECONDS = 10.0
#: A check waits for the store no longer than that. Commits of ours hold it for less than a second.
STORE_SECONDS = 3.0
#: What an older report says of "since when" is not known to hold until now.
PREVIOUS_SECONDS = 600.0


def examine_health(
    *,
    settings: Settings,
    folder: DataFolder,
    now: float,
    checks: Mapping[str, Check] = CHECKS,
    seconds: float = LOOK_SECONDS,
) -> HealthReport:
    """Return how the deployment is at this moment; takes little longer than `seconds`.

    Args:
        settings: In force.
        folder: The data folder; nothing in it is changed, but for a file that comes and goes and
            a commit to the store that changes nothing.
        now: POSIX seconds.
        checks: By name.
        seconds: For all of them together.
    """
    look = CheckContext(
        settings=settings,
        folder=folder,
        store=Store(folder.duckdb, deadline_seconds=STORE_SECONDS),
        now=now,
        previous=_previous(folder, now),
    )
    inquiries = [_inquire(name, check, look) for name, check in checks.items()]
    until = time.monotonic() + seconds
    findings: list[Finding] = []
    for inquiry in inquiries:
        inquiry.join(max(0.0, until - time.monotonic()))
        findings += inquiry.findings()
    return HealthReport(
        at=now,
        findings=dated(findings, previous=look.previous, now=now),
        standstill=_standstill(look),
    )


class _CheckThread(threading.Thread):
    """One check in a thread of its own: a driver, a disk or a lock may never answer."""

    def __init__(self, name: str, check: Check, look: CheckContext) -> None:
        super().__init__(name=f"health:{name}", daemon=True)
        self._check_name, self._check, self._look = name, check, look
        self._began = time.monotonic()
        self._found: Iterable[Finding] = ()

    def run(self) -> None:
        try:
            self._found = tuple(self._check(self._look))
        except Exception as error:
            logger.exception("the health check %r failed", self._check_name)
            self._found = (self._unhealthy(f"the check itself failed: {error!r}"),)

    def findings(self) -> Iterable[Finding]:
        """Return what was found so far; that it hangs is a finding, too."""
        if self.is_alive():
            waited = time.monotonic() - self._began
            return (self._unhealthy(f"the check has not answered for {waited:.0f} s"),)
        return self._found or (self._unhealthy("the check found nothing to say"),)

    def _unhealthy(self, reason: str) -> Finding:
        return Finding(
            check=self._check_name,
            level=Level.UNHEALTHY,
            reason=reason,
            next_command="python -m batch_orchestration health",
        )


#: Those that were begun last, by data folder and check.
_inquiries: dict[tuple[Path, str], _CheckThread] = {}
_inquiring = threading.Lock()


def _inquire(name: str, check: Check, look: CheckContext) -> _CheckThread:
    """Begin a check. If the same one still hangs, nobody else is sent after it."""
    with _inquiring:
        before = _inquiries.get((look.folder.root, name))
        if before is not None and before.is_alive():
            return before
        inquiry = _inquiries[look.folder.root, name] = _CheckThread(name, check, look)
        inquiry.start()
        return inquiry


def _previous(folder: DataFolder, now: float) -> HealthReport | None:
    with contextlib.suppress(StorageError):  # it is replaced
        previous = read_health(folder)
        if previous is not None and 0 <= now - previous.at <= PREVIOUS_SECONDS:
            return previous
    return None


def _standstill(look: CheckContext) -> Standstill | None:
    try:
        return standstill(look)
    except (StorageError, OSError):  # the checks say so
        return None
