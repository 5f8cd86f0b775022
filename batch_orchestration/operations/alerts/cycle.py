"""The alert cycle: observe, decide on transitions, save them durably, and only then send them.

The watchdog runs the same cycle in a process of its own, about one condition: whether cycles of
`alert_sensor` still run.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from batch_orchestration.core.errors import FileDamaged, StorageError
from batch_orchestration.core.text import duration
from batch_orchestration.core.waiting import IdleClock
from batch_orchestration.files.atomic import disk_errors
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.alerts.channels import Send, deliver, delivered_late
from batch_orchestration.operations.alerts.notification import Change, Notification, Transition
from batch_orchestration.operations.alerts.sources import observe
from batch_orchestration.operations.alerts.state import (
    AlertState,
    Attempt,
    Observation,
    advance,
    due,
    sent,
)
from batch_orchestration.operations.health.links import CLI, RESTART, sensor_link
from batch_orchestration.operations.health.report import AlertKind, Finding, Level
from batch_orchestration.settings import Settings

logger = logging.getLogger(__name__)
_LOG_LEVELS = {
    Level.UNHEALTHY: logging.ERROR,
    Level.DEGRADED: logging.WARNING,
    Level.HEALTHY: logging.INFO,
}
#: `alert_sensor` runs every 30 s; no restart explains a longer silence.
SILENT_SECONDS = 300.0
#: Between two checks of the watchdog.
WATCH_SECONDS = 30.0
#: Longest time counted between two checks; a check itself waits for its notifications.
LONGEST_STEP_SECONDS = 60.0
#: States that a full disk could not take, by path: without them each tick would repeat all alerts.
_unsaved: dict[Path, AlertState] = {}


class Cycle(NamedTuple):
    """The result of one cycle: the new state, its transitions, and the attempts to send them."""

    state: AlertState
    transitions: tuple[Transition, ...]
    attempts: Mapping[str, Attempt]

    def __str__(self) -> str:
        parts = [f"open: {len(self.state.open)}", f"new: {len(self.transitions)}"]
        for name, channel in self.state.channels.items():
            if channel.problem is not None:
                parts.append(f"{name}: {channel.pending.count} wait, {channel.problem}")
            elif channel.pending.count:
                parts.append(f"{name}: {channel.pending.count} wait")
        titles = sorted(transition.finding.title for transition in self.state.open.values())
        return "; ".join([*parts, *titles])

    def lines(self) -> list[str]:
        """Return the transitions and the result of each notification as text."""
        texts = [transition.text for transition in self.transitions]
        sent_to = [f"{name}: {tried.problem or 'sent'}" for name, tried in self.attempts.items()]
        return [*texts, *sent_to]


def run_alert_cycle(
    *,
    settings: Settings,
    folder: DataFolder,
    channels: Mapping[str, Send],
    now: float,
    observed: Observation | None = None,
    path: Path | None = None,
) -> Cycle:
    """Observe once, and send the notifications that are due.

    Only one cycle runs at a time; it owns the state. Transitions are saved before they are sent, so
    a process that dies in between sends them again: none is lost, and few are repeated.

    Args:
        channels: By name.
        observed: In place of the sources.
        path: Of the state; default: that of `alert_sensor`.

    Raises:
        StorageError: Another cycle is running.
    """
    path, rate = path or folder.alerts, settings.alert_posts_per_hour
    with alert_cycle(path):
        state, lost = _read_or_begin(path, now)
        if observed is None:
            observed = observe(settings=settings, folder=folder, state=state, now=now)
        if lost is not None:
            observed = replace(observed, findings=[*observed.findings, lost])
        state, transitions = advance(
            state,
            observed,
            channels=channels.keys(),
            repeat_seconds=settings.alert_repeat_seconds,
            now=now,
        )
        late = delivered_late(folder.root)
        _log(transitions, late)
        state = sent(state, late, posts_per_hour=rate, now=now)
        _save(path, state)
        attempts = deliver(due(state, posts_per_hour=rate, now=now), channels, root=folder.root)
        if attempts:
            _log((), attempts)
            state = sent(state, attempts, posts_per_hour=rate, now=now)
            _save(path, state)
    return Cycle(state, transitions, attempts)


def _log(transitions: Iterable[Transition], attempts: Mapping[str, Attempt]) -> None:
    for transition in transitions:
        text = " | ".join(transition.text.splitlines())
        logger.log(_LOG_LEVELS[transition.level], "%s", text)
    for name, attempt in attempts.items():
        if attempt.is_hopeless:
            logger.error("%s refused an alert, which is dropped: %s", name, attempt.problem)
        elif attempt.problem is not None:
            logger.warning("alerts wait for %s: %s", name, attempt.problem)


def send_test(
    channels: Mapping[str, Send], *, folder: DataFolder, now: float
) -> dict[str, str | None]:
    """Send a test alert through all channels; return each channel's problem, None if it was sent.

    The alert state does not change.
    """
    finding = Finding(
        check=str(AlertKind.TEST),
        level=Level.HEALTHY,
        reason=f"it was sent by hand; the data folder is {folder.root}",
        since=now,
        kind=AlertKind.TEST,
        title="This is a test of the alerts of batch_orchestration",
        next_command=f"{CLI} health",
    )
    transition = Transition(change=Change.RAISED, finding=finding, at=now)
    notifications = dict.fromkeys(channels, Notification(transitions=(transition,)))
    attempts = deliver(notifications, channels, root=folder.root, strict=True)
    return {name: attempt.problem for name, attempt in attempts.items()}


@contextlib.contextmanager
def alert_cycle(path: Path) -> Iterator[None]:
    """Hold the lock of the state at `path` during one cycle.

    Raises:
        StorageError: Another cycle is running, for example a tick requested in the UI.
    """
    with disk_errors(path):
        try:
            lock = FileLock(path.with_name(f"{path.name}.lock")).acquire(timeout=0)
        except Timeout:
            raise StorageError(f"{path} is in use by another tick") from None
    with lock:
        yield


def _read_or_begin(path: Path, now: float) -> tuple[AlertState, Finding | None]:
    """Return the state, and an alert if a damaged state had to be replaced."""
    if (unsaved := _unsaved.get(path)) is not None:
        return unsaved, None
    try:
        return StateFile(path, AlertState).read() or AlertState(began=now, cursor=now), None
    except FileDamaged as error:
        # It begins where the last cycle ended, so that nothing since then is history.
        began = min(now - 1, _last_cycle_at(path) or now)
        try:
            path.replace(path.with_name(f"{path.stem}.damaged-{int(time.time())}.json"))
        except OSError as problem:
            logger.warning("the damaged alert state cannot be renamed: %s", problem)
        return AlertState(began=began, cursor=began), Finding(
            check=f"{AlertKind.ALERTS_LOST}:{now:.0f}",
            level=Level.DEGRADED,
            reason=f"{error}; unsent alerts are lost, and conditions that last are sent again",
            since=now,
            kind=AlertKind.ALERTS_LOST,
            title="The alert state was damaged and is now empty",
            next_command=f"{CLI} status",
        )


def _save(path: Path, state: AlertState) -> None:
    try:
        StateFile(path, AlertState).write(state)
        _unsaved.pop(path, None)
    except StorageError as error:
        # The full disk is the very thing that the alert is about.
        _unsaved[path] = state
        with contextlib.suppress(OSError):  # the watchdog sees that a cycle has run
            os.utime(path)
        logger.warning("the alert state is only in memory: %s", error)


def _last_cycle_at(path: Path) -> float | None:
    """Return the state's modification time, which each cycle changes; None if there is no file."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


class Watchdog:
    """Checks that alert cycles still run.

    Args:
        channels: By name.
        clock: Monotonic seconds. The watchdog counts the time that it watched an unchanged state,
            so a clock change, sleep or shutdown does not count.
    """

    def __init__(
        self,
        settings: Settings,
        folder: DataFolder,
        channels: Mapping[str, Send],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._folder, self._channels = settings, folder, channels
        self._clock = clock
        self._idle = IdleClock(longest_step=LONGEST_STEP_SECONDS, now=clock())

    def check(self, now: float) -> Cycle:
        """Check once, and send the notifications that are due.

        Raises:
            OSError: The data folder cannot be read.
        """
        silent = self._idle.observe(_last_cycle_at(self._folder.alerts), self._clock())
        findings = [self._alert(silent)] if silent > SILENT_SECONDS else []
        return run_alert_cycle(
            settings=self._settings,
            folder=self._folder,
            channels=self._channels,
            now=now,
            observed=Observation(findings=findings),
            path=self._folder.alerts.with_name("alerts-watchdog.json"),
        )

    def _alert(self, silent: float) -> Finding:
        return Finding(
            check=str(AlertKind.ALERTS_SILENT),
            kind=AlertKind.ALERTS_SILENT,
            level=Level.UNHEALTHY,
            title="Dagster's daemon or its code location is dead",
            reason=(
                f"alert_sensor has not run for {duration(silent)}: no file is admitted, no run is"
                " started and no alert is sent; runs in progress continue"
            ),
            link=sensor_link(self._settings, "alert_sensor"),
            next_command=RESTART,
        )
