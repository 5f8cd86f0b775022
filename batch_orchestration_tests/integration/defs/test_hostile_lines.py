"""One line that no step can make sense of costs its file that line, and other files nothing."""

import json
from contextlib import closing

import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration_tests.support.builders import make_body, make_line
from batch_orchestration_tests.support.deployment import Deployment

#: By the name of the file: what a field's value becomes, the code, and what is said of it.
HOSTILE = {
    "infinite": (b"1e999", "invalid_request", "the number in `body.PLACE` is out of range"),
    "deep": (b"[" * 950 + b"]" * 950, "invalid_json", "nested more than 128 deep"),
    "half": (b'"cut \\ud83d"', "invalid_json", "half of a surrogate pair"),
    "n": (b'0, "n": 1000000000000', "invalid_request", "`body.n` is 1,000,000,000,000; more"),
    "wide": (
        b'0, "max_completion_tokens": 2000000000',
        "context_length_exceeded",
        "max_completion_tokens is 2,000,000,000; the engine's context has",
    ),
}


@pytest.fixture
def deployment(tmp_path):
    # As many as may be unfinished: if they held their places, no other file would be admitted.
    limits = {"max_unfinished_batches": len(HOSTILE), "max_queued_tokens": 100_000}
    with closing(Deployment(tmp_path, **limits)) as deployed:
        yield deployed


def hostile_file(value: bytes) -> bytes:
    line = make_line(1, body=make_body("hello", PLACE="VALUE")).replace(b'"VALUE"', value)
    return make_line(0) + line + make_line(2)


def work_through(deployment: Deployment, *, batches: int) -> None:
    """Do what the daemon does until so many batches are delivered."""
    for _ in range(10 * batches):
        if len(deployment.statuses("batch_output")) == batches:
            return
        for sensor in ("inbox_sensor", "dispatch_sensor"):
            for request in deployment.requests(sensor):
                assert deployment.run(request).success
    raise AssertionError(deployment.reason("dispatch_sensor"))


def test_every_file_with_such_a_line_is_admitted_and_delivered_with_its_other_lines(deployment):
    for name, (value, _, _) in HOSTILE.items():
        deployment.drop(f"{name}.jsonl", hostile_file(value))
    work_through(deployment, batches=len(HOSTILE))
    deployment.drop("sound.jsonl", make_line(0) + make_line(1))
    work_through(deployment, batches=len(HOSTILE) + 1)

    records = {record.file_name: record for record in deployment.store.batches()}
    assert {record.status for record in records.values()} == {BatchStatus.COMPLETED}
    assert (records["sound.jsonl"].completed, records["sound.jsonl"].failed) == (2, 0)
    for name, (_, code, words) in HOSTILE.items():
        record = records[f"{name}.jsonl"]
        (row,) = map(json.loads, lines_of(deployment, record.batch_id, "errors.jsonl"))
        assert (record.completed, record.failed) == (2, 1)
        assert (row["custom_id"], row["error"]["code"]) == ("request-1", code)
        assert row["error"]["message"].startswith("line 2: ") or code.startswith("context")
        assert words in row["error"]["message"]
        answered = map(json.loads, lines_of(deployment, record.batch_id, "output.jsonl"))
        assert [row["custom_id"] for row in answered] == ["request-0", "request-2"]


def lines_of(deployment: Deployment, batch_id: str, name: str) -> list[str]:
    return (deployment.folder.outbox_path(batch_id) / name).read_text().splitlines()
