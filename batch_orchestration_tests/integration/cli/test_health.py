"""`health` on the command line: its exit codes, and what a person reads at three in the morning."""

import pytest

from batch_orchestration.operations.health import examine as health_service
from batch_orchestration.queue.entries import NeedsAttention, Pause
from batch_orchestration.queue.pause import pause
from batch_orchestration_tests.support.command_line import CommandLine
from batch_orchestration_tests.support.health_bench import HealthBench


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(health_service, "STORE_SECONDS", 0.2)
    return HealthBench(tmp_path)


def say(bench, *arguments, exit_code):
    cli = CommandLine(bench.folder)
    given = {"settings": bench.in_force, "clock": lambda: bench.now}
    if "--json" in arguments:
        return cli.json("health", exit_code=exit_code, **given)
    return cli.run("health", exit_code=exit_code, **given).stdout


def test_all_well_is_exit_code_0(bench):
    bench.tick()

    assert say(bench, exit_code=0).splitlines()[-1] == "healthy"


def test_degraded_is_exit_code_3_with_the_next_command(bench):
    bench.tick()
    pause(bench.folder, Pause(at=bench.now - 60, actor="mallory"))

    text = say(bench, exit_code=3)

    assert text.splitlines()[-1] == "degraded: queue"
    assert "python -m batch_orchestration resume" in text


def test_unhealthy_is_exit_code_1_and_the_worst_comes_first(bench):
    bench.tick(needs=(NeedsAttention(batch_id="b-1", run_id="run-9", reason="it broke"),))
    bench.now += 10_000

    rows = say(bench, exit_code=1)
    found = say(bench, "--json", exit_code=1)

    assert rows.index("dagster") < rows.index("person:b-1") < rows.index("disk")
    assert found["level"] == "unhealthy"
    assert all(f["next_command"] for f in found["findings"] if f["level"] != "healthy")


def test_a_deployment_without_a_data_folder_is_not_healthy(bench, tmp_path):
    bench.folder = type(bench.folder)(tmp_path / "nothing here")

    assert "unhealthy" in say(bench, exit_code=1)
    assert not (tmp_path / "nothing here").exists()
