"""`kill -9` of whoever runs the alert cycle, at each moment that matters: nothing is lost."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.operations.alerts import cycle as alerting
from batch_orchestration_tests.support.alert_bench import AlertBench
from batch_orchestration_tests.support.alert_servers import Webhook, serving
from batch_orchestration_tests.support.forks import run_forked


def cycle(root: Path, url: str, now: float, moment: str) -> None:
    """Run the alert cycle once; die at the moment that is told."""
    tower = AlertBench(root, SimpleNamespace(url=url))
    tower.now = now

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    deliver = alerting.deliver

    def send_and_die(*arguments: Any, **options: Any) -> None:
        deliver(*arguments, **options)
        die()

    if moment == "before the state is kept":
        alerting.StateFile.write = die
    if moment == "before it is sent":
        alerting.deliver = die
    if moment == "before it is known to be sent":
        alerting.deliver = send_and_die
    tower.cycle()


@pytest.mark.parametrize(
    ("moment", "arrived"),
    [
        ("before the state is kept", 1),
        ("before it is sent", 1),
        # Nobody can know whether it was sent.
        ("before it is known to be sent", 2),
    ],
)
def test_killed_at_any_moment_it_loses_no_alert(tmp_path, monkeypatch, moment, arrived):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Webhook()) as webhook:
        tower = AlertBench(tmp_path, webhook)
        tower.begin()
        tower.end(tower.add(failing=(1, 2)), BatchStatus.COMPLETED)
        tower.now += 30
        died = run_forked(cycle, tmp_path, webhook.url, tower.now, moment)

        for _ in range(3):
            tower.tick()

        assert died == -signal.SIGKILL
        assert len(webhook.texts) == arrived
        assert all("too many failures" in text for text in webhook.texts)
        assert not list(tower.folder.root.glob("*.damaged-*"))
