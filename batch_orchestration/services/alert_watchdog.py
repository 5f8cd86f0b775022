"""The watchdog: tells through the channels that nobody looks for alerts any more.

A process of its own, for a daemon that is dead can tell nobody. It keeps a state of its own, so
that it tells once, and when it is over.
"""

import time
from collections.abc import Callable, Mapping

from batch_orchestration.core.text import duration
from batch_orchestration.domain.alert_book import Observation
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.operations.health.links import RESTART, sensor_link
from batch_orchestration.operations.health.report import AlertKind, Finding, Level
from batch_orchestration.services.alert_channels import Send
from batch_orchestration.services.alerting import Cycle, run_alert_cycle
from batch_orchestration.settings import Settings
from batch_orchestration.storage.alert_files import last_cycle_at
from batch_orchestration.workers.watch import Unchanged

#: `alert_sensor` looks every 30 s; so long without it no restart explains.
SILENT_SECONDS = 300.0
LOOK_SECONDS = 30.0
#: What counts between two looks at most; a look itself waits for its posts.
LONGEST_STEP_SECONDS = 60.0


class Watchdog:
    """Looks whether alerts are looked for.

    Args:
        settings: In force.
        folder: The data folder.
        channels: By name.
        clock: Monotonic seconds. What is counted is for how long the state has not changed while we
            looked: a clock that is set, or a machine that slept or was off, tells nothing.
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
        self._looked_at = clock()
        self._state = Unchanged()

    def look(self, now: float) -> Cycle:
        """Look once, and send what is due.

        Raises:
            OSError: The data folder cannot be looked at.
        """
        looked_at, self._looked_at = self._looked_at, self._clock()
        step = min(self._looked_at - looked_at, LONGEST_STEP_SECONDS)
        self._state.take_in(last_cycle_at(self._folder.alerts), step)
        silent = self._state.seconds
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
