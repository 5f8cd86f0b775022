"""The alert cycle: observe, decide on transitions, save them durably, and only then send them."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from batch_orchestration.core.errors import Shortage, StorageError
from batch_orchestration.core.text import duration
from batch_orchestration.core.waiting import IdleClock
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.operations.alerts.channels import Send, deliver, delivered_late
from batch_orchestration.operations.alerts.notification import Change, Notification, Transition
from batch_orchestration.operations.alerts.sources import LOOK_BACK_SECONDS, observe
from batch_orchestration.operations.alerts.state import (
    AlertRules,
    AlertState,
    Attempt,
    Observation,
    advance,
    due,
    sent,
)
from batch_orchestration.operations.alerts.state_file import (
    alert_cycle,
    last_cycle_at,
    read_alert_state,
    set_alert_state_aside,
    touch_alert_state,
    write_alert_state,
)
from batch_orchestration.operations.health.links import RESTART, sensor_link
from batch_orchestration.operations.health.report import AlertKind, Finding, Level
from batch_orchestration.settings import Settings

logger = logging.getLogger(__name__)
_LOG_LEVELS = {
    Level.UNHEALTHY: logging.ERROR,
    Level.DEGRADED: logging.WARNING,
    Level.HEALTHY: logging.INFO,
}
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


def alert_rules(settings: Settings) -> AlertRules:
    """Return the rules of the alert state from the settings."""
    return AlertRules(
        repeat_seconds=settings.alert_repeat_seconds,
        posts_per_hour=settings.alert_posts_per_hour,
    )


def run_alert_cycle(
    *,
    settings: Settings,
    folder: DataFolder,
    channels: Mapping[str, Send],
    now: float,
    observe: Callable[..., Observation] = observe,
    path: Path | None = None,
) -> Cycle:
    """Observe once, and send the notifications that are due.

    Only one cycle runs at a time; it owns the state. Transitions are saved before they are sent, so
    a process that dies in between sends them again: none is lost, and few are repeated.

    Args:
        channels: By name.
        observe: Returns the present observation.
        path: Of the state; default: that of `alert_sensor`.

    Raises:
        StorageError: Another cycle is running.
    """
    path, rules = path or folder.alerts, alert_rules(settings)
    with alert_cycle(path):
        state, lost = _read_or_begin(path, now)
        observed = observe(settings=settings, folder=folder, state=state, now=now)
        if lost is not None:
            observed = replace(observed, findings=[*observed.findings, lost])
        state, transitions = advance(
            state,
            observed,
            channels=channels.keys(),
            rules=rules,
            now=now,
            remember_seconds=LOOK_BACK_SECONDS,
        )
        state = _noted(state, delivered_late(folder.root), rules, now)
        _save(path, state)
        for transition in transitions:
            level = _LOG_LEVELS[transition.level]
            logger.log(level, "%s", " | ".join(transition.text.splitlines()))
        attempts = deliver(due(state, rules=rules, now=now), channels, root=folder.root)
        if attempts:
            state = _noted(state, attempts, rules, now)
            _save(path, state)
    return Cycle(state, transitions, attempts)


def _noted(
    state: AlertState, attempts: Mapping[str, Attempt], rules: AlertRules, now: float
) -> AlertState:
    for name, attempt in attempts.items():
        if attempt.is_hopeless:
            logger.error("%s refused an alert, which is dropped: %s", name, attempt.problem)
        elif attempt.problem is not None:
            logger.warning("alerts wait, for %s: %s", name, attempt.problem)
    return sent(state, attempts, rules=rules, now=now)


def send_test(
    channels: Mapping[str, Send], *, folder: DataFolder, now: float
) -> dict[str, str | None]:
    """Send a test alert through all channels; return each channel's problem, None if it was sent.

    The alert state does not change.
    """
    finding = Finding(
        check=str(AlertKind.TEST),
        level=Level.HEALTHY,
        reason=f"somebody asked for it; the data folder is {folder.root}",
        since=now,
        kind=AlertKind.TEST,
        title="This is a test of the alerts of batch_orchestration",
        next_command="python -m batch_orchestration health",
    )
    transition = Transition(change=Change.RAISED, finding=finding, at=now)
    notifications = dict.fromkeys(channels, Notification(transitions=(transition,)))
    attempts = deliver(notifications, channels, root=folder.root, strict=True)
    return {name: attempt.problem for name, attempt in attempts.items()}


def _read_or_begin(path: Path, now: float) -> tuple[AlertState, Finding | None]:
    """Return the state, and an alert if a damaged state had to be replaced."""
    if (unsaved := _unsaved.get(path)) is not None:
        return unsaved, None
    try:
        return read_alert_state(path) or AlertState(began=now, cursor=now), None
    except Shortage:
        raise  # the state may be sound: the next cycle reads it
    except StorageError as error:
        # It begins where the last cycle ended, so that nothing since then is history.
        began = min(now - 1, last_cycle_at(path) or now)
        _set_aside(path)
        return AlertState(began=began, cursor=began), Finding(
            check=f"{AlertKind.ALERTS_LOST}:{now:.0f}",
            level=Level.DEGRADED,
            reason=f"{error}; what was not sent yet is lost, what lasts is told again",
            since=now,
            kind=AlertKind.ALERTS_LOST,
            title="The alert state was damaged and begins again",
            next_command="python -m batch_orchestration status",
        )


def _set_aside(path: Path) -> None:
    try:
        set_alert_state_aside(path)
    except StorageError as error:
        logger.warning("the damaged alert state stays where it is: %s", error)


def _save(path: Path, state: AlertState) -> None:
    try:
        write_alert_state(path, state)
        _unsaved.pop(path, None)
    except StorageError as error:
        # The full disk is the very thing that the alert is about.
        _unsaved[path] = state
        touch_alert_state(path)
        logger.warning("the alert state is kept in memory: %s", error)


#: `alert_sensor` runs every 30 s; no restart explains a longer silence.
SILENT_SECONDS = 300.0
LOOK_SECONDS = 30.0
#: Longest time counted between two checks; a check itself waits for its notifications.
LONGEST_STEP_SECONDS = 60.0


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

    def look(self, now: float) -> Cycle:
        """Check once, and send the notifications that are due.

        Raises:
            OSError: The data folder cannot be read.
        """
        silent = self._idle.observe(last_cycle_at(self._folder.alerts), self._clock())
        findings = [self._alert(silent)] if silent > SILENT_SECONDS else []
        return run_alert_cycle(
            settings=self._settings,
            folder=self._folder,
            channels=self._channels,
            now=now,
            observe=lambda **_: Observation(findings=findings),
            path=self._folder.alerts.with_name("alerts-watchdog.json"),
        )

    def _alert(self, silent: float) -> Finding:
        return Finding(
            check=str(AlertKind.ALERTS_SILENT),
            kind=AlertKind.ALERTS_SILENT,
            level=Level.UNHEALTHY,
            title="Dagster's daemon or its code location is dead",
            reason=(
                f"alert_sensor has not looked for {duration(silent)}: nothing is admitted, started"
                " or told; runs at work go on"
            ),
            link=sensor_link(self._settings, "alert_sensor"),
            next_command=RESTART,
        )
