"""Ways to Dagster, for those who are told of something elsewhere: its pages, and its start."""

import urllib.request
from typing import Any
from urllib.parse import quote

from batch_orchestration.settings import Settings

#: As `workspace.yaml` and `pyproject.toml` name it.
LOCATION = "batch_orchestration"
#: What a person types when Dagster is dead.
RESTART = "systemctl restart batch-orchestration.target; without systemd: dagster dev"


def run_link(settings: Settings, run_id: str) -> str:
    """Return the page of a run."""
    return f"{_base(settings)}/runs/{quote(run_id, safe='')}"


def sensor_link(settings: Settings, sensor: str) -> str:
    """Return the page of a sensor, with its ticks."""
    return f"{_base(settings)}/locations/{LOCATION}/sensors/{quote(sensor, safe='')}"


def batch_link(settings: Settings, batch_id: str) -> str:
    """Return the page of a batch: its partition of `batch_output`."""
    partition = quote(batch_id, safe="")
    return f"{_base(settings)}/assets/batch_output?view=partitions&partition={partition}"


def health_link(settings: Settings) -> str:
    """Return the page of the check that the deployment is healthy."""
    return f"{_base(settings)}/assets/queue_overview?view=checks"


def _base(settings: Settings) -> str:
    return settings.dagster_url.rstrip("/")


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Has a redirect be an answer like any other.

    urllib would take `Authorization` along to whomever it names, and make a GET of a POST: the
    alert would be lost, and taken for sent.
    """

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none."""
