"""`alerts` on the command line."""

import sys

import pytest

from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.alerts.channels import alert_channels
from batch_orchestration.operations.alerts.cycle import run_alert_cycle
from batch_orchestration.operations.health.report import Finding, HealthReport, Level
from batch_orchestration.settings import Settings
from batch_orchestration_tests.support.builders import NOW

FAIL = [sys.executable, "-c", "raise SystemExit(3)"]
TAKE = [sys.executable, "-c", "import sys; sys.stdin.read()"]


@pytest.fixture(autouse=True)
def _folder(cli):
    cli.folder.create()


def settings(cli, **values):
    return Settings(data_dir=cli.folder.root, engine="simulated", **values, _env_file=None)


def given(cli, **values):
    return {"settings": settings(cli, **values), "clock": lambda: NOW + 100}


def test_open_alerts_are_listed_with_what_is_still_to_be_sent(cli):
    in_force = settings(cli, alert_command=FAIL)
    ill = Finding(check="gpu", level=Level.UNHEALTHY, reason="it fell off", next_command="gpu")
    StateFile(cli.folder.health, HealthReport).write(HealthReport(at=NOW, findings=(ill,)))
    run_alert_cycle(
        settings=in_force, folder=cli.folder, channels=alert_channels(in_force), now=NOW + 10
    )

    text = cli.run("alerts", **given(cli)).stdout
    found = cli.json("alerts", **given(cli))

    assert "The GPU is unhealthy" in text
    assert "1 min 30 s ago" in text
    assert "command: 1 to be sent; the command ended with 3" in text
    assert [alert["kind"] for alert in found["open"]] == ["gpu_unhealthy"]
    assert found["channels"]["command"]["waiting"] == 1


def test_before_the_first_tick_there_is_nothing_to_show(cli):
    assert "has not run yet" in cli.run("alerts", **given(cli)).stdout
    assert not cli.folder.alerts.exists()


def test_a_test_says_of_every_channel_what_happened(cli):
    good = cli.run("alerts", "--test", **given(cli, alert_command=TAKE))
    bad = cli.run("alerts", "--test", exit_code=1, **given(cli, alert_command=FAIL))

    assert good.stdout == "command: sent\n"
    assert bad.stdout == "command: the command ended with 3: \n"
    assert not cli.folder.alerts.exists()


def test_a_test_without_any_channel_fails_and_says_what_to_set(cli):
    result = cli.run("alerts", "--test", exit_code=1, **given(cli))

    assert "BATCH_ALERT_WEBHOOK_URL" in result.stderr


def test_a_watch_tells_of_a_dead_daemon_until_it_is_interrupted(cli):
    now = [NOW]

    def sleep(seconds):
        now[0] += seconds
        if now[0] > NOW + 600:
            raise KeyboardInterrupt

    result = cli.run(
        "alerts", "--watch", settings=settings(cli, alert_command=TAKE), clock=lambda: now[0],
        monotonic=lambda: now[0], sleep=sleep,
    )  # fmt: skip

    assert result.stdout.count("daemon or its code location is dead") == 1
    assert result.stdout.count("command: sent") == 1
    assert not cli.folder.alerts.exists()
