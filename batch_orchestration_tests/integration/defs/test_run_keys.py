"""Keys of runs: whatever people delete, each sensor asks with a key that Dagster does not skip."""

from collections.abc import Callable
from itertools import product

import dagster as dg
import pytest

from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.dead_letters.actions import request_replay
from batch_orchestration.defs import replays, sensors
from batch_orchestration.defs.partitions import BATCH_TAG, RUN_KEY_TAG
from batch_orchestration.defs.runs import RETRIED_BY_TAG, WILL_RETRY_TAG, free_run_key
from batch_orchestration_tests.support.builders import NOW, make_body, make_input, make_line
from batch_orchestration_tests.support.deployment import FAILURE, Deployment

NOT_STARTED = dg.DagsterRunStatus.NOT_STARTED


@pytest.fixture
def deployment(deploy: Callable[..., Deployment], monkeypatch: pytest.MonkeyPatch) -> Deployment:
    monkeypatch.setattr("batch_orchestration.dispatch.run_planning.BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr("batch_orchestration.dispatch.run_planning.MAX_FAILURES", 100)
    monkeypatch.setattr(replays, "MAX_FAILURES", 100)
    monkeypatch.setattr(sensors, "MAX_FAILURES", 100)
    return deploy()


def claimed(deployment: Deployment) -> str:
    """A file that waits for its admission."""
    deployment.drop("a.jsonl", make_input(3))
    return "inbox_sensor"


def admitted(deployment: Deployment) -> str:
    """A batch of which every chunk is missing."""
    deployment.admit("a.jsonl", make_input(3))
    return "dispatch_sensor"


def answered(deployment: Deployment) -> str:
    """A batch that only wants its output."""
    deployment.admit("a.jsonl", make_input(3))
    (request,) = deployment.requests("dispatch_sensor")
    assert deployment.run(request).success
    return "dispatch_sensor"


def replayed(deployment: Deployment) -> str:
    """A delivered batch with a replay that nobody has run."""
    refused = make_line(0, body=make_body("question 0", max_tokens=-1))
    batch_id = deployment.admit("a.jsonl", refused)
    deployment.work_off()
    request_replay(
        batch_id, Selection(), folder=deployment.folder, store=deployment.store, actor="me", at=NOW
    )
    return "replay_sensor"


def make_run(
    deployment: Deployment, request: dg.RunRequest, status: dg.DagsterRunStatus, **tags: str
) -> dg.DagsterRun:
    """The run that Dagster's daemon makes of a request."""
    return deployment.pretend(request, status, **{RUN_KEY_TAG: request.run_key or "", **tags})


def is_skipped(deployment: Deployment, request: dg.RunRequest) -> bool:
    """Whether Dagster's daemon would skip a request: `_get_or_create_sensor_run`."""
    found = deployment.instance.get_runs(dg.RunsFilter(tags={RUN_KEY_TAG: request.run_key or ""}))
    return any(run.status is not NOT_STARTED for run in found)


@pytest.mark.parametrize("case", [claimed, admitted, answered, replayed])
def test_whichever_failed_runs_are_deleted_the_next_is_asked_for_with_a_free_key(
    deployment: Deployment, case: Callable[[Deployment], str]
) -> None:
    sensor = case(deployment)
    for deleted in product([False, True], repeat=3):
        runs = []
        for _ in deleted:
            (request,) = deployment.requests(sensor)
            assert not is_skipped(deployment, request), (deleted, request.run_key)
            runs.append(make_run(deployment, request, FAILURE))

        for run, goes in zip(runs, deleted, strict=True):
            if goes:
                deployment.instance.delete_run(run.run_id)

        (request,) = deployment.requests(sensor)
        (again,) = deployment.requests(sensor)
        assert not is_skipped(deployment, request), (deleted, request.run_key)
        assert request.run_key == again.run_key
        for run in runs:
            deployment.instance.delete_run(run.run_id)


def test_a_run_whose_retry_was_deleted_does_not_keep_the_batch_from_the_next(
    deployment: Deployment,
) -> None:
    sensor = admitted(deployment)
    (request,) = deployment.requests(sensor)
    make_run(deployment, request, FAILURE, **{WILL_RETRY_TAG: "true", RETRIED_BY_TAG: "gone"})

    (again,) = deployment.requests(sensor)

    assert not is_skipped(deployment, again)
    assert again.run_key == f"{request.run_key.removesuffix('#0')}#1"


def test_a_run_that_was_created_and_never_queued_is_launched_by_its_own_key(
    deployment: Deployment,
) -> None:
    sensor = admitted(deployment)
    (request,) = deployment.requests(sensor)
    make_run(deployment, request, NOT_STARTED)

    (again,) = deployment.requests(sensor)

    assert again.run_key == request.run_key


def test_a_re_execution_holds_the_key_that_it_inherits(deployment: Deployment) -> None:
    sensor = admitted(deployment)
    (request,) = deployment.requests(sensor)
    original = make_run(deployment, request, FAILURE)
    make_run(deployment, request, FAILURE)
    deployment.instance.delete_run(original.run_id)
    assert deployment.instance.get_runs(dg.RunsFilter(tags={BATCH_TAG: request.tags[BATCH_TAG]}))

    (again,) = deployment.requests(sensor)

    assert not is_skipped(deployment, again)
    assert free_run_key(deployment.instance, request.run_key or "") == again.run_key


def test_every_run_about_a_batch_says_which_and_whose(deployment: Deployment) -> None:
    (deployment.folder.inbox / "alice").mkdir()
    deployment.drop("alice/a.jsonl", make_line(0, body=make_body("question 0", max_tokens=-1)))
    (admitting,) = deployment.requests("inbox_sensor")
    results = [deployment.run(admitting)]
    (batch_id,) = deployment.folder.batch_ids()
    results += deployment.work_off()
    results.append(deployment.launch("cancel_batch", batch=batch_id))
    by_hand = dg.RunRequest(job_name="deliver_batch", partition_key=batch_id, tags={})
    results.append(deployment.run(by_hand))
    results.append(deployment.launch("replay_failed_requests", batch=batch_id))

    runs = [deployment.instance.get_run_by_id(result.run_id) for result in results]
    assert len(runs) == 6
    assert {(run.tags["batch"], run.tags["source"]) for run in runs} == {(batch_id, "alice")}
