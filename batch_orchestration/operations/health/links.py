"""Links to Dagster's pages for messages shown elsewhere, and the command that starts it."""

import urllib.request
from typing import Any
from urllib.parse import quote

from batch_orchestration.settings import Settings

#: The name in `workspace.yaml` and `pyproject.toml`.
LOCATION = "batch_orchestration"
#: The command line, in the next commands of findings.
CLI = "python -m batch_orchestration"
#: The command for a person when Dagster is dead.
RESTART = "systemctl restart batch-orchestration.target; without systemd: dagster dev"


def run_link(settings: Settings, run_id: str) -> str:
    """Return the URL of a run."""
    return f"{_base(settings)}/runs/{quote(run_id, safe='')}"


def sensor_link(settings: Settings, sensor: str) -> str:
    """Return the URL of a sensor, with its ticks."""
    return f"{_base(settings)}/locations/{LOCATION}/sensors/{quote(sensor, safe='')}"


def batch_link(settings: Settings, batch_id: str) -> str:
    """Return the URL of a batch: its partition of `batch_output`."""
    partition = quote(batch_id, safe="")
    return f"{_base(settings)}/assets/batch_output?view=partitions&partition={partition}"


def health_link(settings: Settings) -> str:
    """Return the URL of the asset check `deployment_is_healthy`."""
    return f"{_base(settings)}/assets/queue_overview?view=checks"


def _base(settings: Settings) -> str:
    return settings.dagster_url.rstrip("/")


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Treats a redirect like any other answer.

    urllib would send `Authorization` to the redirect's target and turn a POST into a GET: the alert
    would be lost, and taken for sent.
    """

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow no redirect."""
