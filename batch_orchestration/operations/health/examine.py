"""Health: the state of a deployment, from its data folder, its settings and its store alone.

Fails closed. A check that raises, misses the deadline or yields nothing becomes an unhealthy
finding with its name; a part that cannot be examined never counts as healthy.
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

#: For all checks together, which run in parallel. A tick of a sensor has 60 s.
LOOK_SECONDS = 10.0
#: Longest wait of a check for the store. Our own commits hold it for less than a second.
STORE_SECONDS = 3.0
#: The `since` of an older report may not have held until now.
PREVIOUS_SECONDS = 600.0


def examine_health(
    *,
    settings: Settings,
    folder: DataFolder,
    now: float,
    checks: Mapping[str, Check] = CHECKS,
    seconds: float = LOOK_SECONDS,
) -> HealthReport:
    """Return the deployment's present health; takes little longer than `seconds`.

    Args:
        folder: The data folder; unchanged, but for a temporary file and a commit to the store
            without a change.
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
    """Runs one check in its own thread: a driver, a disk or a lock may never answer."""

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
        """Return the findings so far; a check that hangs is a finding, too."""
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


#: The latest thread of each check, by data folder and check.
_inquiries: dict[tuple[Path, str], _CheckThread] = {}
_inquiring = threading.Lock()


def _inquire(name: str, check: Check, look: CheckContext) -> _CheckThread:
    """Start a check; if its previous thread still hangs, return that one instead."""
    with _inquiring:
        before = _inquiries.get((look.folder.root, name))
        if before is not None and before.is_alive():
            return before
        inquiry = _inquiries[look.folder.root, name] = _CheckThread(name, check, look)
        inquiry.start()
        return inquiry


def _previous(folder: DataFolder, now: float) -> HealthReport | None:
    with contextlib.suppress(StorageError):  # a damaged report is replaced
        previous = read_health(folder)
        if previous is not None and 0 <= now - previous.at <= PREVIOUS_SECONDS:
            return previous
    return None


def _standstill(look: CheckContext) -> Standstill | None:
    try:
        return standstill(look)
    except (StorageError, OSError):  # the checks report it
        return None
