"""The watchdog: tells through the channels that nobody looks for alerts any more.

A process of its own, for a daemon that is dead can tell nobody. It keeps a book of its own, so that
it tells once, and when it is over.
"""

from collections.abc import Mapping

from batch_orchestration.domain.alert_book import Seen
from batch_orchestration.domain.alerts import Alert, AlertKind, Severity
from batch_orchestration.services.alert_channels import Send
from batch_orchestration.services.alerting import Tended, tend_alerts
from batch_orchestration.services.dagster_links import RESTART, sensor_link
from batch_orchestration.services.wording import duration
from batch_orchestration.settings import Settings
from batch_orchestration.storage.alert_files import last_tended
from batch_orchestration.storage.files import DataFolder

#: `alert_sensor` looks every 30 s; so long without it no restart explains.
SILENT_SECONDS = 300.0
LOOK_SECONDS = 30.0


class Watchdog:
    """Looks whether alerts are looked for.

    Args:
        settings: In force.
        folder: The data folder.
        channels: By name.
        began: POSIX seconds; what was before is not held against a machine that was off.
    """

    def __init__(
        self,
        settings: Settings,
        folder: DataFolder,
        channels: Mapping[str, Send],
        *,
        began: float,
    ) -> None:
        self._settings, self._folder, self._channels = settings, folder, channels
        self._began = began

    def look(self, now: float) -> Tended:
        """Look once, and send what is due.

        Raises:
            OSError: The data folder cannot be looked at.
        """
        silent = now - max(last_tended(self._folder.alerts) or 0.0, self._began)
        conditions = [self._alert(silent)] if silent > SILENT_SECONDS else []
        return tend_alerts(
            settings=self._settings,
            folder=self._folder,
            channels=self._channels,
            now=now,
            look=lambda **_: Seen(conditions=conditions, cursor=now),
            path=self._folder.alerts.with_name("alerts-watchdog.json"),
        )

    def _alert(self, silent: float) -> Alert:
        return Alert(
            key=str(AlertKind.ALERTS_SILENT),
            kind=AlertKind.ALERTS_SILENT,
            severity=Severity.ERROR,
            title="Dagster's daemon or its code location is dead",
            cause=(
                f"alert_sensor has not looked for {duration(silent)}: nothing is admitted, started"
                " or told; runs at work go on"
            ),
            link=sensor_link(self._settings, "alert_sensor"),
            next_command=RESTART,
        )
