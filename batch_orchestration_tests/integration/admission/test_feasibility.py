"""Requests that the engine will certainly refuse end as dead letters at admission, unasked."""

import json
from contextlib import closing

import dagster as dg
import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.dead_letters import actions as dead_letters
from batch_orchestration.defs.partitions import BATCH_TAG, range_tags
from batch_orchestration.engines.simulated.answers import CONTEXT_TOKENS
from batch_orchestration_tests.support.builders import make_body, make_line
from batch_orchestration_tests.support.deployment import Deployment


@pytest.fixture
def deployment(tmp_path):
    with closing(Deployment(tmp_path, model_aliases={"known": "simulated-model"})) as deployed:
        yield deployed


def make_request(number, **fields):
    return make_line(number, body=make_body(f"question {number}", **{"model": "known", **fields}))


def make_mixed():
    return b"".join(
        [
            make_request(0),
            make_request(1, model="unknown"),
            make_request(2, max_tokens=CONTEXT_TOKENS + 1),
            make_request(3, max_tokens=CONTEXT_TOKENS - 100),
        ]
    )


def answer(deployment, batch_id):
    tags = {BATCH_TAG: batch_id, **range_tags(batch_id, range(1))}
    assert deployment.run(dg.RunRequest(job_name="answer_chunks", tags=tags)).success
    delivery = dg.RunRequest(job_name="deliver_batch", partition_key=batch_id)
    assert deployment.run(delivery).success


def failures_of(deployment, batch_id):
    lines = (deployment.folder.outbox_path(batch_id) / "errors.jsonl").read_text().splitlines()
    return {row["custom_id"]: row["error"] for row in map(json.loads, lines)}


def test_what_cannot_be_answered_is_never_sent_and_the_rest_is(deployment):
    batch_id = deployment.admit("a.jsonl", make_mixed())
    assert deployment.folder.read_plan(batch_id).faulty == 2

    answer(deployment, batch_id)

    record = deployment.store.batch(batch_id)
    assert (record.status, record.completed, record.failed) == (BatchStatus.COMPLETED, 2, 2)
    failures = failures_of(deployment, batch_id)
    assert {name: error["code"] for name, error in failures.items()} == {
        "request-1": "model_not_found",
        "request-2": "context_length_exceeded",
    }
    assert "it serves simulated-model" in failures["request-1"]["message"]
    assert f"{CONTEXT_TOKENS + 1:,}" in failures["request-2"]["message"]
    _, rows = deployment.store.query("SELECT DISTINCT attempts, run_id FROM failed_requests")
    assert rows == [(0, "admission")]


def test_such_a_dead_letter_can_be_replayed_with_what_it_lacks(deployment):
    batch_id = deployment.admit("a.jsonl", make_mixed())
    answer(deployment, batch_id)

    asked = dead_letters.request_replay(
        batch_id,
        Selection(),
        folder=deployment.folder,
        store=deployment.store,
        actor="somebody",
        at=1.0,
        overrides={"model": "simulated-model", "max_tokens": 5},
        model_required=True,
        force=False,
    )

    assert asked.requests == 2
    assert not asked.left_out


def test_a_file_of_nothing_else_is_rejected_with_the_numbers(deployment):
    deployment.drop("a.jsonl", make_request(0, model="unknown") + make_request(1, model="other"))
    (request,) = deployment.requests("inbox_sensor")

    assert deployment.run(request).success

    assert deployment.store.batches() == []
    errors = json.loads((deployment.folder.rejected / "a.jsonl.errors.json").read_text())
    assert [error["code"] for error in errors["errors"]] == ["model_not_found"] * 2
    assert "it serves simulated-model" in errors["errors"][0]["message"]
