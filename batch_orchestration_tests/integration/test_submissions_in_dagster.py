"""Submissions as Dagster sees them: jobs given a submission's id, and the tags of all runs."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import dagster as dg
import pytest

from batch_orchestration.services.parts import waiting_parts
from batch_orchestration.storage.operations import open_replays
from batch_orchestration_tests.builders import make_body, make_input, make_line
from batch_orchestration_tests.integration.deployment import Deployment


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with closing(Deployment(tmp_path, max_requests_per_batch=5, failure_budget=1.0)) as deployment:
        yield deployment


def split(deployment: Deployment, content: bytes) -> str:
    """A file of alice's that became parts of five requests; return the submission's id."""
    (deployment.folder.inbox / "alice").mkdir()
    deployment.drop("alice/people.jsonl", content)
    (request,) = deployment.requests("inbox_sensor")
    result = deployment.run(request)
    assert result.success
    (submission_id,) = deployment.folder.submission_ids()
    assert tags_of(deployment, result) == ("", submission_id, "alice")
    return submission_id


def tags_of(deployment: Deployment, result: dg.ExecuteInProcessResult) -> tuple[str, ...]:
    run = deployment.instance.get_run_by_id(result.run_id)
    assert run is not None
    return tuple(run.tags.get(name, "") for name in ("batch", "submission", "source"))


def launch(
    deployment: Deployment, job: str, op: str, **config: object
) -> dg.ExecuteInProcessResult:
    run_config = {"ops": {op: {"config": config}}}
    return deployment.run(dg.RunRequest(job_name=job, run_config=run_config))


def work_off(deployment: Deployment) -> list[dg.RunRequest]:
    """Do what the daemon does until nothing is asked for; return what was."""
    done: list[dg.RunRequest] = []
    while requests := deployment.requests("dispatch_sensor"):
        assert all(deployment.run(request).success for request in requests)
        done += requests
    return done


def custom_ids(deployment: Deployment, submission_id: str, name: str) -> list[str]:
    path = deployment.folder.outbox_path(submission_id) / name
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


def test_jobs_cancel_and_resume_a_whole_submission(tmp_path: Path) -> None:
    settings = {"max_requests_per_batch": 5, "max_unfinished_batches": 1}
    with closing(Deployment(tmp_path, **settings)) as deployment:
        submission_id = split(deployment, make_input(12))
        deployment.tick("dispatch_sensor")
        assert len(waiting_parts(deployment.folder)) == 2

        cancelled = launch(deployment, "cancel_batch", "cancel_one", batch=submission_id)
        delivered = work_off(deployment)

        assert cancelled.success
        assert tags_of(deployment, cancelled) == ("", submission_id, "alice")
        assert {request.job_name for request in delivered} == {"deliver_batch"}
        assert {str(record.status) for record in deployment.store.batches()} == {"cancelled"}
        assert len(custom_ids(deployment, submission_id, "errors.jsonl")) == 12

        resumed = launch(deployment, "resume_batch", "resume_one", batch=submission_id)
        work_off(deployment)

        assert resumed.success
        assert {str(record.status) for record in deployment.store.batches()} == {"completed"}
        everyone = [f"request-{number}" for number in range(12)]
        assert custom_ids(deployment, submission_id, "output.jsonl") == everyone
        again = launch(deployment, "cancel_batch", "cancel_one", batch=submission_id)
        assert not again.success


def test_a_launched_replay_of_a_submission_answers_the_failures_of_every_part(
    deployment: Deployment,
) -> None:
    bodies = (make_body(f"question {n}", max_tokens=-1 if n in (1, 11) else 9) for n in range(12))
    content = b"".join(make_line(n, body=body) for n, body in enumerate(bodies))
    submission_id = split(deployment, content)
    work_off(deployment)
    assert custom_ids(deployment, submission_id, "errors.jsonl") == ["request-1", "request-11"]

    result = launch(
        deployment,
        *("replay_failed_requests", "replay_dead_letters"),
        batch=submission_id,
        max_tokens=9,
    )

    assert result.success
    assert open_replays(deployment.folder) == []
    assert custom_ids(deployment, submission_id, "errors.jsonl") == []
    assert len(custom_ids(deployment, submission_id, "output.jsonl")) == 12
    assert tags_of(deployment, result) == (f"{submission_id}-p3of3", submission_id, "alice")


def test_every_run_about_a_part_says_of_which_submission_and_whose(deployment: Deployment) -> None:
    submission_id = split(deployment, make_input(6))

    requests = work_off(deployment)

    assert {request.job_name for request in requests} == {"answer_chunks", "deliver_batch"}
    for request in requests:
        assert request.tags["batch"].startswith(f"{submission_id}-p")
        assert request.tags["submission"] == submission_id
        assert request.tags["source"] == "alice"
        assert request.tags["dagster/priority"] == "0"


def test_every_run_about_a_batch_says_whose_it_is(deployment: Deployment) -> None:
    deployment.drop("a.jsonl", make_line(0, body=make_body("question 0", max_tokens=-1)))
    (admitting,) = deployment.requests("inbox_sensor")
    admitted = deployment.run(admitting)
    (batch_id,) = deployment.folder.batch_ids()
    whose = (batch_id, "", "inbox")

    requests = work_off(deployment)
    cancelled = launch(deployment, "cancel_batch", "cancel_one", batch=batch_id)
    by_hand = deployment.run(
        dg.RunRequest(job_name="deliver_batch", partition_key=batch_id, tags={})
    )
    replayed = launch(deployment, "replay_failed_requests", "replay_dead_letters", batch=batch_id)

    for result in (admitted, cancelled, by_hand, replayed):
        assert tags_of(deployment, result) == whose
    assert [(r.tags["batch"], r.tags["source"]) for r in requests] == [(batch_id, "inbox")] * 2
