"""What ticks do does not grow with history: counted in files and rows, not in seconds."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dagster as dg
import pytest

from batch_orchestration.defs.alerts import AlertsResource
from batch_orchestration.status.views import view_batches
from batch_orchestration.store import rows
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.history import make_history

SENSORS = (
    *("inbox_sensor", "dispatch_sensor", "replay_sensor"),
    *("recovery_sensor", "health_sensor", "alert_sensor"),
)
OLD = "old-"

#: Audit hooks stay for good; this one tells whom it is set to, while it is.
_opened: list[str] | None = None


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event in ("open", "os.listdir", "os.scandir", "glob.glob"):
        _opened.append(str(arguments[0]))


sys.addaudithook(_note)


@contextmanager
def opened() -> Iterator[list[str]]:
    """Every file and folder that is opened meanwhile."""
    global _opened
    found: list[str] = []
    _opened = found
    try:
        yield found
    finally:
        _opened = None


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    deployment = deploy(max_unfinished_batches=1)
    make_history(deployment.folder, deployment.store, completed=40, cancelled=10)
    deployment.admit("at_work.jsonl", make_input(12))
    deployment.drop("waits.jsonl", make_input(5))
    for sensor in SENSORS:  # the first tick of a deployment searches
        tick(deployment, sensor)
    return deployment


def tick(deployment: Deployment, sensor: str) -> None:
    settings = deployment.settings
    context = dg.build_sensor_context(
        instance=deployment.instance,
        repository_def=deployment.repository,
        resources={"settings": settings, "alerts": AlertsResource.of(settings)},
    )
    deployment.repository.get_sensor_def(sensor)(context)


@pytest.mark.parametrize("sensor", SENSORS)
def test_a_tick_opens_nothing_of_finished_batches_and_reads_no_row_of_theirs(
    deployment: Deployment, sensor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counting(row: rows.Row) -> object:
        read.append(row["batch_id"])
        return record(row)

    record = rows.batch_record
    monkeypatch.setattr(rows, "batch_record", counting)

    with opened() as paths:
        tick(deployment, sensor)

    assert [path for path in paths if OLD in path] == []
    assert [batch_id for batch_id in read if batch_id.startswith(OLD)] == []


def test_the_history_is_one_that_the_services_understand(deployment: Deployment) -> None:
    views = view_batches(folder=deployment.folder, store=deployment.store, now=0.0)

    statuses = [str(view.status) for view in views if view.batch_id.startswith(OLD)]
    assert (statuses.count("completed"), statuses.count("cancelled")) == (40, 10)
