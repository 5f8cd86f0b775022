"""Health: the state of a deployment, from its data folder, its settings and its store alone.

Fails closed. A check that raises, misses the deadline or yields nothing becomes an unhealthy
finding with its name; a part that cannot be examined never counts as healthy.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.waiting import BackgroundCall
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.health.checks import CHECKS, standstill
from batch_orchestration.operations.health.context import HEALTH, Check, CheckContext, unhealthy
from batch_orchestration.operations.health.report import (
    Finding,
    HealthReport,
    Standstill,
    dated,
)
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
    context = CheckContext(
        settings=settings,
        folder=folder,
        store=Store(folder.duckdb, deadline_seconds=STORE_SECONDS),
        now=now,
        previous=_previous(folder, now),
    )
    calls = {name: _call(name, check, context) for name, check in checks.items()}
    until = time.monotonic() + seconds
    findings: list[Finding] = []
    for name, call in calls.items():
        call.returned(within=until - time.monotonic())
        findings += _findings(name, call)
    return HealthReport(
        at=now,
        findings=dated(findings, previous=context.previous, now=now),
        standstill=_standstill(context),
    )


_Call = BackgroundCall[tuple[Finding, ...]]
#: The latest call of each check, by data folder and check.
_calls: dict[tuple[Path, str], _Call] = {}
_calling = threading.Lock()


def _call(name: str, check: Check, context: CheckContext) -> _Call:
    """Start a check; if its previous call still hangs, return that one instead."""
    key = (context.folder.root, name)
    with _calling:
        if key not in _calls or _calls[key].returned():
            _calls[key] = BackgroundCall(f"health:{name}", lambda: tuple(check(context)))
        return _calls[key]


def _findings(name: str, call: _Call) -> tuple[Finding, ...]:
    if not call.returned():
        reason = f"the check has not answered for {call.seconds:.0f} s"
        return (unhealthy(name, reason, HEALTH),)
    try:
        return call.result() or (unhealthy(name, "the check found nothing", HEALTH),)
    except Exception as error:
        logger.exception("the health check %r failed", name)
        return (unhealthy(name, f"the check itself failed: {error!r}", HEALTH),)


def _previous(folder: DataFolder, now: float) -> HealthReport | None:
    with contextlib.suppress(StorageError):  # a damaged report is replaced
        previous = StateFile(folder.health, HealthReport).read()
        if previous is not None and 0 <= now - previous.at <= PREVIOUS_SECONDS:
            return previous
    return None


def _standstill(context: CheckContext) -> Standstill | None:
    try:
        return standstill(context)
    except (StorageError, OSError):  # the checks report it
        return None
