"""The watchdog: who tells that nobody looks for alerts any more."""

import pytest

from batch_orchestration.operations.alerts import cycle as alerting
from batch_orchestration.operations.alerts.cycle import Watchdog
from batch_orchestration_tests.support.alert_bench import AlertBench, FullDisk
from batch_orchestration_tests.support.alert_servers import Webhook, serving


@pytest.fixture
def tower(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Webhook()) as server:
        yield AlertBench(tmp_path, server)


class Guard:
    """A watchdog with a clock of its own beside the tower's, which may be set."""

    def __init__(self, tower):
        self.tower, self.seconds = tower, 0.0
        self.dog = Watchdog(
            tower.in_force,
            tower.folder,
            tower.channels,
            clock=lambda: self.seconds,
        )

    def watch(self, minutes, *, alive):
        for _ in range(2 * minutes):
            self.tower.now += 30
            self.seconds += 30
            if alive:
                self.tower.tick(seconds=0)
            self.dog.check(self.tower.now)


def test_a_dead_daemon_is_told_by_the_watchdog_once_and_when_it_is_back(tower):
    guard = Guard(tower)

    guard.watch(10, alive=True)
    assert tower.webhook.texts == []
    guard.watch(30, alive=False)
    assert "daemon or its code location is dead" in tower.only()
    guard.watch(8, alive=True)

    assert [text.split("]")[0] for text in tower.webhook.texts][1:] == ["[recovered"]


def test_a_daemon_that_dies_when_the_clock_is_set_back_is_noticed(tower):
    guard = Guard(tower)
    guard.watch(2, alive=True)
    tower.now -= 36_000

    guard.watch(6, alive=False)

    assert "daemon or its code location is dead" in tower.only()


def test_a_machine_that_slept_or_was_off_is_given_time_to_go_on(tower):
    guard = Guard(tower)
    guard.watch(2, alive=True)
    tower.now += 36_000
    guard.seconds += 36_000  # some clocks go on meanwhile

    guard.watch(2, alive=False)
    Guard(tower).watch(2, alive=False)

    assert tower.webhook.texts == []


def test_a_daemon_whose_disk_is_full_is_not_taken_for_dead(tower, monkeypatch):
    guard = Guard(tower)
    guard.watch(2, alive=True)

    with monkeypatch.context() as patch:
        patch.setattr(alerting, "StateFile", FullDisk)
        guard.watch(10, alive=True)
    alerting._unsaved.clear()

    assert tower.webhook.texts == []
