"""Replays as Dagster runs them, with the simulated engine."""

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest
from dagster._core.errors import DagsterExecutionInterruptedError

from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.core.errors import EngineStartFailed
from batch_orchestration.dead_letters.actions import request_replay
from batch_orchestration.defs import replays
from batch_orchestration.queue import pause as queue_pause
from batch_orchestration.queue.entries import Pause
from batch_orchestration.store.operations import open_replays
from batch_orchestration_tests.support.builders import NOW, make_body, make_line
from batch_orchestration_tests.support.deployment import Deployment


@pytest.fixture
def deployment(deploy: Callable[..., Deployment]) -> Deployment:
    return deploy(failure_budget=0.1)


def delivered(deployment: Deployment) -> str:
    """A delivered batch of eight requests, two of which the engine has refused."""
    lines = [
        make_line(n, body=make_body(f"question {n}", **({"max_tokens": -1} if n in (1, 6) else {})))
        for n in range(8)
    ]
    batch_id = deployment.admit("candidates.jsonl", b"".join(lines))
    deployment.work_off()
    assert deployment.store.batch(batch_id).failed == 2
    return batch_id


def lines(deployment: Deployment, batch_id: str, name: str) -> list[str]:
    path = deployment.folder.outbox_path(batch_id) / name
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def ask(deployment: Deployment, batch_id: str, **options: Any) -> None:
    """Ask for a replay, as the command line does."""
    folder, store = deployment.folder, deployment.store
    request_replay(
        batch_id, Selection(), folder=folder, store=store, actor="tester", at=NOW, **options
    )


def test_a_launched_replay_delivers_the_answers(deployment: Deployment) -> None:
    batch_id = delivered(deployment)
    assert lines(deployment, batch_id, "errors.jsonl") == ["request-1", "request-6"]

    result = deployment.launch(
        "replay_failed_requests", batch=batch_id, codes=["engine_refused"], max_tokens=16
    )

    assert result.success
    assert lines(deployment, batch_id, "errors.jsonl") == []
    assert lines(deployment, batch_id, "output.jsonl") == [f"request-{n}" for n in range(8)]
    event = deployment.instance.get_latest_materialization_event(dg.AssetKey("batch_output"))
    assert event is not None
    assert event.asset_materialization is not None
    assert event.asset_materialization.partition == batch_id
    metadata = event.asset_materialization.metadata
    assert metadata["replay_answered"].value == 2
    assert metadata["failed"].value == 0
    assert {check.check_name: check.passed for check in result.get_asset_check_evaluations()} == {
        "every_request_has_an_outcome": True,
        "failure_rate_within_budget": True,
    }


def test_a_replay_of_nothing_fails_with_the_reason_and_is_not_tried_again(
    deployment: Deployment,
) -> None:
    batch_id = delivered(deployment)

    unknown = deployment.launch("replay_failed_requests", batch=batch_id, codes=["nonsense"])
    none = deployment.launch("replay_failed_requests", batch=batch_id, codes=["timeout"])

    for result, reason in ((unknown, "codes are"), (none, "matches the selection")):
        assert not result.success
        (failure,) = result.get_step_failure_events()
        assert reason in str(failure.step_failure_data.error_display_string)


def test_the_sensor_starts_what_was_asked_for_elsewhere_once(deployment: Deployment) -> None:
    batch_id = delivered(deployment)
    assert deployment.reason("replay_sensor") == "no replay is open"
    ask(deployment, batch_id, overrides={"max_tokens": 16})

    (request,) = deployment.requests("replay_sensor")
    (again,) = deployment.requests("replay_sensor")

    assert request.run_key == again.run_key
    assert deployment.run(request).success
    assert open_replays(deployment.folder) == []
    assert deployment.reason("replay_sensor") == "no replay is open"
    assert lines(deployment, batch_id, "errors.jsonl") == []


def test_a_replay_waits_while_the_queue_is_paused(deployment: Deployment) -> None:
    batch_id, folder = delivered(deployment), deployment.folder
    ask(deployment, batch_id)
    queue_pause.pause(folder, Pause(at=NOW, actor="ada", reason="maintenance"))

    assert deployment.reason("replay_sensor") == "paused: ada paused the queue: maintenance"

    queue_pause.unpause(folder)
    assert len(deployment.requests("replay_sensor")) == 1


def test_a_replay_that_nobody_can_make_a_run_of_stops_no_other(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tags(batch_id: str, folder: object) -> dict[str, str]:
        if batch_id == "odd":
            raise KeyError("what nobody has thought of")
        return {}

    monkeypatch.setattr(replays, "tags_about", tags)
    monkeypatch.setattr(replays, "open_replays", lambda folder: [("odd", 1), ("sound", 1)])
    (request,) = deployment.requests("replay_sensor")
    assert request.run_config["ops"]["replay_dead_letters"]["config"]["batch"] == "sound"

    monkeypatch.setattr(replays, "open_replays", lambda folder: [("odd", 1)])
    assert "replay 1 of odd: KeyError" in deployment.reason("replay_sensor")


def test_a_replay_that_cannot_run_waits_for_a_person(deployment: Deployment) -> None:
    batch_id = delivered(deployment)
    ask(deployment, batch_id)
    (request,) = deployment.requests("replay_sensor")
    deployment.folder.input_path(batch_id).rename(deployment.folder.root / "away")

    assert not deployment.run(request).success

    assert "waits for a person" in deployment.reason("replay_sensor")


def test_a_terminated_replay_is_not_tried_again_by_itself(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id, calls = delivered(deployment), []

    def interrupted(*_: object, **__: object) -> None:
        calls.append(1)
        # What the launcher does to a worker whose run a person terminates.
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)

    monkeypatch.setattr(replays, "run_replay", interrupted)

    try:
        result = deployment.launch("replay_failed_requests", batch=batch_id)
        assert not result.success
    except DagsterExecutionInterruptedError:
        pass  # Dagster lets it out once the step has ended

    assert len(calls) == 1
    (run,) = deployment.instance.get_runs(dg.RunsFilter(job_name="replay_failed_requests"))
    kinds = [entry.dagster_event_type for entry in deployment.instance.all_logs(run.run_id)]
    assert dg.DagsterEventType.STEP_UP_FOR_RETRY not in kinds


def test_a_replay_whose_engine_does_not_come_up_is_tried_thrice_by_its_run(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id, calls = delivered(deployment), []
    monkeypatch.setattr("batch_orchestration.defs.runs.STEP_RETRY_SECONDS", 0)

    def sick(*_: object, **__: object) -> None:
        calls.append(1)
        raise EngineStartFailed("it does not come up")

    monkeypatch.setattr(replays, "run_replay", sick)

    assert not deployment.launch("replay_failed_requests", batch=batch_id).success
    assert len(calls) == 3
