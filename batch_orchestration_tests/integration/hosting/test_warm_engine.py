"""A warm engine under Dagster and the command line: a real host and server, simulated answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.hosting.hosts import end_engines, running_engines
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.command_line import CommandLine
from batch_orchestration_tests.support.deployment import Deployment


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path, engine_keep_alive=600)
    yield deployment
    end_engines(deployment.folder, only_idle=False)
    deployment.close()


def answer_all(deployment: Deployment) -> None:
    """Run whatever dispatch asks for, until nothing is left."""
    while requests := deployment.requests("dispatch_sensor"):
        for request in requests:
            assert deployment.run(request).success


def engine_log(deployment: Deployment) -> dict[str, Any]:
    [engine] = running_engines(deployment.folder)
    return {"pid": engine.state.pid, "leases": engine.state.leases}


def test_the_second_batch_is_answered_by_the_engine_of_the_first(deployment: Deployment) -> None:
    first = deployment.admit("a.jsonl", make_input(7))
    answer_all(deployment)
    before = engine_log(deployment)
    second = deployment.admit("b.jsonl", make_input(9))
    answer_all(deployment)

    assert engine_log(deployment) == before == {**before, "leases": 0}
    for batch_id, count in ((first, 7), (second, 9)):
        assert deployment.store.batch(batch_id).status == "completed"
        output = deployment.folder.outbox_path(batch_id) / "output.jsonl"
        assert len(output.read_bytes().splitlines()) == count


def test_an_engine_with_other_flags_replaces_the_idle_one(tmp_path: Path) -> None:
    first = Deployment(tmp_path, engine_keep_alive=600, engine_args={"seed": 1})
    second = Deployment(tmp_path, engine_keep_alive=600, engine_args={"seed": 2})
    try:
        first.admit("a.jsonl", make_input(3))
        answer_all(first)
        before = engine_log(first)
        second.admit("b.jsonl", make_input(4))
        answer_all(second)
        assert engine_log(second)["pid"] != before["pid"]
    finally:
        end_engines(second.folder, only_idle=False)
        first.close()
        second.close()


def test_the_command_shows_the_engine_and_ends_it(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCH_DATA_DIR", str(deployment.folder.root))
    cli = CommandLine(deployment.folder)
    assert "No engine runs." in cli.run("engine").output
    deployment.admit("a.jsonl", make_input(3))
    answer_all(deployment)
    pid = engine_log(deployment)["pid"]

    [shown] = json.loads(cli.run("engine", "--json").stdout)
    assert shown["state"]["pid"] == pid
    assert shown["state"]["leases"] == 0
    assert str(pid) in cli.run("engine").output
    assert "1 engine ended." in cli.run("engine", "stop").output
    assert running_engines(deployment.folder) == []
