"""Alerts in Dagster: the resource with the channels, and the sensor that runs the cycle."""

import time

import dagster as dg
from pydantic import Field

from batch_orchestration.core.errors import StorageError
from batch_orchestration.defs.resources import SettingsResource, data_folder
from batch_orchestration.operations.alerts.channels import Send, alert_channels
from batch_orchestration.operations.alerts.cycle import run_alert_cycle
from batch_orchestration.settings import Settings

INTERVAL_SECONDS = 30


class AlertsResource(dg.ConfigurableResource):
    """The alert channels; the log always receives every alert.

    The fields show whether a secret is set, never its value.
    """

    webhook: bool = Field(description="Whether BATCH_ALERT_WEBHOOK_URL is set.")
    email_to: str = Field(description="Addresses that get mail.")
    smtp_host: str = Field(description="Mail server.")
    command: str = Field(description="Program that gets alerts; not its arguments.")

    @classmethod
    def of(cls, settings: Settings) -> "AlertsResource":
        """Return the resource for these settings."""
        return cls(
            webhook=bool(settings.alert_webhook_url.get_secret_value()),
            email_to=settings.alert_email_to,
            smtp_host=settings.smtp_host,
            command=settings.alert_command[0] if settings.alert_command else "",
        )

    def channels(self, settings: Settings) -> dict[str, Send]:
        """Return the channels, with the secrets of the settings."""
        return alert_channels(settings)


@dg.sensor(
    minimum_interval_seconds=INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Sends alerts: batches that failed, expired or wait for a person, an unhealthy GPU, a full "
        "disk, a stalled queue; and their recovery. Reads the store, the health and the files, "
        "keeps open alerts and unsent messages in `alerts.json`, and sends them by webhook, mail "
        "or command, as configured. Starts no runs."
    ),
)
def alert_sensor(
    context: dg.SensorEvaluationContext, settings: SettingsResource, alerts: AlertsResource
) -> dg.SkipReason:
    """Run one alert cycle; this sensor is the only writer of `alerts.json`."""
    try:
        cycle = run_alert_cycle(
            settings=settings,
            folder=data_folder(settings),
            channels=alerts.channels(settings),
            now=time.time(),
        )
    except StorageError as error:
        return dg.SkipReason(f"no alerts were sent: {error}")
    for text in cycle.lines():
        context.log.info(text)
    return dg.SkipReason(str(cycle))
