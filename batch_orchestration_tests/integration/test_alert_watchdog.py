"""The watchdog: who tells that nobody looks for alerts any more."""

import os

import pytest

from batch_orchestration.services.alert_channels import alert_channels
from batch_orchestration.services.alert_watchdog import Watchdog
from batch_orchestration_tests.alert_bench import Tower
from batch_orchestration_tests.alert_servers import Webhook, serving
from batch_orchestration_tests.builders import NOW


@pytest.fixture
def tower(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Webhook()) as server:
        yield Tower(tmp_path, server)


def test_a_dead_daemon_is_told_by_the_watchdog_once_and_when_it_is_back(tower):
    watchdog = Watchdog(
        tower.settings, tower.folder, alert_channels(tower.settings), began=tower.now
    )

    def watch(minutes, *, alive):
        for _ in range(minutes):
            tower.now += 60
            if alive:
                tower.tick(seconds=0)
                os.utime(tower.folder.alerts, (tower.now, tower.now))
            watchdog.look(tower.now)

    watch(10, alive=True)
    assert tower.webhook.texts == []
    watch(30, alive=False)
    assert "daemon or its code location is dead" in tower.only()
    watch(5, alive=True)

    assert [text.split("]")[0] for text in tower.webhook.texts][1:] == ["[recovered"]


def test_a_machine_that_was_off_is_given_time_to_start(tower):
    tower.begin()
    os.utime(tower.folder.alerts, (NOW, NOW))
    tower.now += 86_400
    channels = alert_channels(tower.settings)
    watchdog = Watchdog(tower.settings, tower.folder, channels, began=tower.now)

    watchdog.look(tower.now + 60)

    assert tower.webhook.texts == []
