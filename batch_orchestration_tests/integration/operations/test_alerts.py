"""Alerts from what is durable to what arrives: events, conditions, accidents of the state."""

import json
import logging
import threading
import time
from contextlib import closing
from functools import partial

import dagster as dg
import msgspec
import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import StorageError
from batch_orchestration.defs.alerts import AlertsResource
from batch_orchestration.estimates.estimate import Band
from batch_orchestration.estimates.scores import Score
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration.operations.alerts import channels as alert_channels
from batch_orchestration.operations.alerts import cycle as alerting
from batch_orchestration.operations.alerts import sources as alert_sources
from batch_orchestration.operations.alerts.sources import SLACK_SECONDS
from batch_orchestration.operations.health.report import AlertKind, Finding, Level
from batch_orchestration.settings import Settings
from batch_orchestration_tests.support.alert_bench import TICK, AlertBench, FullDisk
from batch_orchestration_tests.support.alert_servers import Webhook, serving
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.estimates import make_estimate


@pytest.fixture
def webhook(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Webhook()) as server:
        yield server


@pytest.fixture
def tower(tmp_path, webhook):
    made = AlertBench(tmp_path, webhook)
    yield made
    alerting._unsaved.clear()


# --- batches --------------------------------------------------------------------------------------


def test_a_batch_with_failures_above_its_budget_is_told_with_counts_page_and_command(tower):
    tower.begin()
    batch_id = tower.add(failing=(1, 2))
    tower.end(batch_id)

    tower.tick()

    assert tower.only().splitlines() == [
        f"[alert] Batch {batch_id} is completed, with too many failures",
        "2 of 10 requests failed: 20.0%, 5.0% allowed",
        "engine_refused: 2",
        f"Page: http://localhost:3000/assets/batch_output?view=partitions&amp;partition={batch_id}",
        f"Next: python -m batch_orchestration failures {batch_id}",
    ]


@pytest.mark.parametrize(
    ("status", "texts"),
    [(BatchStatus.COMPLETED, []), (BatchStatus.EXPIRED, ["has expired"])],
)
def test_a_batch_that_ends_badly_is_an_alert_and_one_that_ends_well_is_none(tower, status, texts):
    tower.begin()
    tower.end(tower.add(), status)

    tower.tick()

    titles = [text.splitlines()[0] for text in tower.webhook.texts]
    assert len(titles) == len(texts)
    assert all(title.endswith(text) for title, text in zip(titles, texts, strict=True))


def test_an_event_that_was_committed_late_is_not_passed_over(tower):
    """Its time is that of the decision; who writes it may wait for the store."""
    tower.begin()
    batch_id = tower.add(failing=(1, 2))
    decided = tower.now
    for _ in range(20):
        tower.tick()

    later, tower.now = tower.now, decided
    tower.end(batch_id)
    tower.now = later
    for _ in range(3):
        tower.tick()

    assert "too many failures" in tower.only()


def test_a_daemon_that_was_dead_for_a_day_tells_afterwards_and_once(tower):
    tower.begin()
    batch_id = tower.add(failing=(1, 2))
    tower.end(batch_id)

    for _ in range(3):
        tower.tick(seconds=86_400)

    assert len(tower.webhook.texts) == 1


def test_a_rejected_file_is_told_once(tower):
    tower.begin()
    path = tower.folder.rejected / "people.jsonl.errors.json"
    path.write_text("{}")

    # The file's time is that of the machine, and so is the watch's then.
    tower.now = path.stat().st_mtime + 1
    tower.tick()
    tower.tick()

    assert "people.jsonl was rejected" in tower.only()


def test_dead_letters_are_told_when_there_are_too_many_and_when_they_are_gone(tower):
    tower.begin()
    batch_id = tower.add(requests=100, failing=range(5))
    tower.tick()
    assert "5 dead letters of 1 batches" in tower.webhook.texts[0]
    assert "engine_refused: 5" in tower.webhook.texts[0]
    assert tower.kinds == [AlertKind.DEAD_LETTERS]

    tower.in_force = tower.in_force.model_copy(update={"alert_dead_letters": 5})
    for _ in range(12):
        tower.tick()

    assert tower.webhook.texts[1].startswith("[recovered]")
    assert batch_id in tower.webhook.texts[0]


# --- estimates ------------------------------------------------------------------------------------


def band(mid):
    return Band(low=0.8 * mid, mid=mid, high=1.2 * mid)


ESTIMATE = make_estimate(seconds=band(100.0))


def add_score(tower, batch_id, *, actual_seconds):
    score = Score(
        batch_id=batch_id, scored_at=tower.now, estimate=ESTIMATE, actual_prompt_tokens=100,
        actual_completion_tokens=50, actual_seconds=actual_seconds,
    )  # fmt: skip
    EstimateTables(tower.store).add_score(score, [], [])


def test_a_batch_far_beyond_its_estimate_is_late_until_it_ends(tower):
    tower.begin()
    plan = tower.admitted(10, at=tower.now)
    path = tower.folder.plan_path(plan.batch_id).with_name("estimate.json")
    path.write_bytes(msgspec.json.encode(ESTIMATE))

    tower.tick(seconds=110 + SLACK_SECONDS)
    assert tower.webhook.texts == []
    tower.tick(seconds=30)
    assert "is far beyond its estimate" in tower.only()
    assert tower.kinds == [AlertKind.BATCH_LATE]

    tower.end(plan.batch_id)
    for _ in range(12):
        tower.tick()
    assert tower.webhook.texts[1].startswith("[recovered]")


def test_each_estimate_that_was_badly_missed_is_one_alert_however_many_there_are(tower):
    tower.begin()
    add_score(tower, "b-well", actual_seconds=300.0)
    missed = {f"b-{number:02}" for number in range(51)}
    for batch_id in missed:
        add_score(tower, batch_id, actual_seconds=800.0)

    cycles = [tower.tick() for _ in range(2)]

    found = [t.finding.check for cycle in cycles for t in cycle.transitions]
    assert sorted(found) == sorted(f"estimate:{batch_id}" for batch_id in missed)


# --- the health -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "level", "kind"),
    [
        ("gpu", Level.UNHEALTHY, AlertKind.GPU_UNHEALTHY),
        ("gpu:0", Level.UNHEALTHY, AlertKind.GPU_UNHEALTHY),
        ("disk", Level.DEGRADED, AlertKind.DISK_LOW),
        ("store", Level.UNHEALTHY, AlertKind.STORE_UNUSABLE),
        ("queue", Level.UNHEALTHY, AlertKind.QUEUE_STALLED),
        ("dagster", Level.UNHEALTHY, AlertKind.DISPATCH_STOPPED),
        ("worker:run-1", Level.UNHEALTHY, AlertKind.BATCH_STUCK),
        ("engine:run-1", Level.DEGRADED, AlertKind.ENGINE_RESTARTS),
        ("engine", Level.UNHEALTHY, AlertKind.ENGINE_SILENT),
        ("person:b-1", Level.DEGRADED, AlertKind.NEEDS_PERSON),
        ("workers", Level.UNHEALTHY, AlertKind.HEALTH_UNKNOWN),
        ("something new", Level.UNHEALTHY, AlertKind.HEALTH_UNKNOWN),
    ],
)
def test_an_ill_check_is_an_alert_and_a_well_one_its_end(tower, check, level, kind):
    tower.begin()
    tower.findings = (Finding(check=check, level=level, reason="it is ill", since=NOW - 600),)
    for _ in range(4):
        tower.tick()
    assert tower.kinds == [kind]
    assert "it is ill" in tower.only()

    tower.findings = ()
    for _ in range(12):
        tower.tick()

    assert tower.kinds == []
    assert [text.split("]")[0] for text in tower.webhook.texts] == ["[alert", "[recovered"]


@pytest.mark.parametrize(
    ("check", "level", "since"),
    [
        ("worker:run-1", Level.UNHEALTHY, None),
        ("store", Level.UNHEALTHY, None),
        ("store", Level.DEGRADED, NOW - 60),  # it is locked
        ("queue", Level.DEGRADED, NOW - 9999),  # a person paused it
    ],
)
def test_a_problem_that_is_small_or_is_soon_over_raises_no_alert(tower, check, level, since):
    tower.begin()
    tower.findings = (Finding(check=check, level=level, reason="stuck", since=since),)
    tower.tick()
    tower.findings = ()
    for _ in range(4):
        tower.tick()

    assert tower.webhook.texts == []


def test_without_a_fresh_report_nothing_is_over_and_that_is_told(tower):
    tower.begin()
    tower.findings = (Finding(check="gpu", level=Level.UNHEALTHY, reason="it fell off"),)
    tower.tick()

    for _ in range(10):
        tower.now += TICK
        tower.cycle()

    assert sorted(tower.kinds) == [AlertKind.GPU_UNHEALTHY, AlertKind.HEALTH_UNKNOWN]
    assert not any("[recovered]" in text for text in tower.webhook.texts)
    assert "The health of the deployment is unknown" in tower.webhook.texts[-1]


def test_a_check_that_could_not_be_done_has_not_recovered_because_the_report_is_stale(tower):
    tower.begin()
    tower.findings = (Finding(check="workers", level=Level.UNHEALTHY, reason="the check failed"),)
    tower.tick()

    for _ in range(40):
        tower.now += TICK
        tower.cycle()

    assert tower.kinds == [AlertKind.HEALTH_UNKNOWN] * 2
    assert not any("[recovered]" in text for text in tower.webhook.texts)


@pytest.mark.parametrize("accident", ["damaged", "deleted"])
def test_while_the_store_cannot_be_read_nothing_of_it_is_over_and_no_event_is_lost(tower, accident):
    tower.begin()
    tower.add(requests=100, failing=range(5))
    tower.tick()
    content = tower.folder.duckdb.read_bytes()

    tower.folder.duckdb.unlink()
    if accident == "damaged":
        tower.folder.duckdb.write_bytes(b"no database" * 1000)
    for _ in range(20):
        tower.tick()
    assert tower.kinds == [AlertKind.DEAD_LETTERS]

    tower.folder.duckdb.write_bytes(content)
    tower.now, later = NOW + 62, tower.now
    tower.end(tower.store.batches()[0].batch_id, BatchStatus.EXPIRED)
    tower.now = later
    tower.tick()

    assert "has expired" in tower.webhook.texts[-1]


def test_a_source_that_fails_is_told_and_silences_no_other(tower, monkeypatch):
    tower.begin()
    batch_id = tower.add(failing=(1, 2))
    tower.end(batch_id)

    def broken(*arguments):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(alert_sources, "_ending", broken)
        tower.findings = (Finding(check="gpu", level=Level.UNHEALTHY, reason="it fell off"),)
        tower.tick()
    told = "\n".join(tower.webhook.texts)
    tower.tick()

    assert "Alerts about the store cannot be found" in told
    assert "The GPU is unhealthy" in told
    assert f"Batch {batch_id} is completed" in tower.webhook.texts[-1]


def test_two_ticks_at_once_tell_nothing_twice(tower):
    """A person may have a sensor evaluated in the UI while the daemon does."""
    tower.begin()

    with alerting.alert_cycle(tower.folder.alerts), pytest.raises(StorageError):
        tower.tick()


# --- channels and the state -----------------------------------------------------------------------


def test_a_webhook_that_only_takes_its_time_gets_each_alert_once(tower, monkeypatch):
    tower.begin()
    monkeypatch.setattr(alerting, "deliver", partial(alert_channels.deliver, seconds=0.05))
    tower.webhook.hold.clear()
    tower.end(tower.add(), BatchStatus.EXPIRED)
    for _ in range(5):
        tower.tick()
    tower.webhook.hold.set()
    while any(thread.name.startswith("alert:") for thread in threading.enumerate()):
        time.sleep(0.01)
    for _ in range(60):
        tower.tick()

    assert "has expired" in tower.only()
    assert len(tower.webhook.asked) == 1


def test_a_broken_channel_changes_nothing_but_what_the_tick_says(tower):
    tower.begin()
    tower.webhook.status = 500
    tower.end(tower.add(failing=(1, 2)))

    cycle = tower.tick()

    assert str(cycle) == "open: 0; new: 1; webhook: 1 wait, the webhook answered 500"
    assert tower.webhook.url not in str(cycle)


def test_the_log_has_every_alert_and_no_secret(tower, caplog):
    caplog.set_level(logging.DEBUG)
    tower.begin()
    tower.webhook.status = 500
    tower.end(tower.add(failing=(1, 2)))

    tower.tick()

    assert "is completed, with too many failures | 2 of 10" in caplog.text
    assert "s3cret" not in caplog.text
    assert b"s3cret" not in tower.folder.alerts.read_bytes()


def test_a_damaged_state_is_kept_aside_and_told(tower):
    tower.begin()
    tower.folder.alerts.write_bytes(b"{")

    tower.tick()

    assert "The alert state was damaged" in tower.only()
    assert [path.read_bytes() for path in tower.folder.root.glob("alerts.damaged-*")] == [b"{"]


def test_a_full_disk_is_told_once_though_the_state_cannot_be_written(tower, monkeypatch):
    tower.begin()
    tower.findings = (Finding(check="disk", level=Level.UNHEALTHY, reason="0.0 GiB are free"),)

    with monkeypatch.context() as patch:
        patch.setattr(alerting, "StateFile", FullDisk)
        for _ in range(5):
            tower.tick()
    tower.tick()

    assert "The disk is nearly full" in tower.only()
    assert tower.state.open


# --- in Dagster -----------------------------------------------------------------------------------


def test_the_resource_shows_which_channels_are_set_and_no_secret():
    settings = Settings(
        engine="simulated", alert_webhook_url="https://hooks/s3cret", smtp_password="s3cret",
        alert_command=["page", "--token", "s3cret"], _env_file=None,
    )  # fmt: skip

    resource = AlertsResource.of(settings)

    assert (resource.webhook, resource.command) == (True, "page")
    assert "s3cret" not in repr(resource)
    assert set(resource.channels(settings)) == {"webhook", "command"}


def test_the_sensor_tells_and_never_fails_and_the_resource_shows_no_secret(tmp_path, webhook):
    with closing(
        Deployment(tmp_path, alert_webhook_url=webhook.url, disk_reserve_bytes=2**60)
    ) as deployment:
        resource = AlertsResource.of(deployment.settings)

        def tick():
            sensor = deployment.repository.get_sensor_def("alert_sensor")
            built = dg.build_sensor_context(
                instance=deployment.instance,
                repository_def=deployment.repository,
                resources={"settings": deployment.settings, "alerts": resource},
            )
            return sensor(built).skip_message

        deployment.reason("dispatch_sensor")
        deployment.reason("health_sensor")
        said = [tick(), tick()]
        state = json.loads(deployment.folder.alerts.read_bytes())

    assert said[0].startswith("open: 1; new: 1")
    assert said[1].startswith("open: 1; new: 0")
    assert [text.splitlines()[0] for text in webhook.texts] == ["[alert] The disk is nearly full"]
    assert list(state["open"]) == ["disk_low:disk"]
    assert "s3cret" not in repr(resource)
