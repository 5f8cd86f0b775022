"""The queue through Dagster: what the ticks write, show and let through."""

import json
from contextlib import ExitStack, closing

import dagster as dg
import msgspec
import pytest

from batch_orchestration.dispatch.queue_building import with_expectations
from batch_orchestration.queue import files as queue_files
from batch_orchestration.queue import pause as queue_pause
from batch_orchestration.queue.entries import EntryKind, Pause, QueueView, WaitReason
from batch_orchestration_tests.support.builders import NOW, make_input
from batch_orchestration_tests.support.deployment import Deployment


@pytest.fixture
def deploy(tmp_path):
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(closing(Deployment(tmp_path, **settings)))


def pause(deployment, reason="maintenance"):
    queue_pause.pause(deployment.folder, Pause(at=NOW, actor="ada", reason=reason))


def entries(deployment):
    return {entry.id: entry for entry in queue_files.read_queue(deployment.folder).entries}


def observations(deployment):
    records = deployment.instance.fetch_observations(dg.AssetKey("batch_manifest"), limit=100)
    found = (record.asset_observation.metadata for record in records.records)
    return [metadata["queue_reason"].value for metadata in found if "queue_reason" in metadata]


def test_a_tick_writes_the_queue_with_everyones_place_and_reason(deploy):
    deployment = deploy(max_unfinished_batches=1)
    batch_id = deployment.admit("alice.jsonl", make_input(3))
    deployment.drop("b.jsonl", make_input(4))
    deployment.tick("inbox_sensor")

    deployment.tick("dispatch_sensor")

    batch, file = entries(deployment)[batch_id], entries(deployment)["b.jsonl"]
    assert (batch.kind, batch.place, batch.reason, batch.pending) == (EntryKind.BATCH, 1, None, 3)
    assert batch.settings_hash == deployment.store.batch(batch_id).settings_hash
    assert batch.deadline > batch.expected_start > 0
    assert (file.kind, file.place, file.reason) == (EntryKind.FILE, 2, WaitReason.QUEUE_FULL)


def test_a_paused_queue_admits_and_starts_nothing_and_says_so_until_it_goes_on(deploy):
    deployment = deploy()
    deployment.admit("a.jsonl", make_input(3))
    deployment.drop("b.jsonl", make_input(4))
    pause(deployment)

    waiting = deployment.reason("dispatch_sensor")
    inbox = deployment.reason("inbox_sensor")

    assert "paused: ada paused the queue: maintenance" in waiting
    assert inbox == "b.jsonl: paused, ada paused the queue: maintenance"
    assert {entry.reason for entry in entries(deployment).values()} == {WaitReason.PAUSED}
    queue_pause.unpause(deployment.folder)
    assert len(deployment.requests("dispatch_sensor")) == 1
    assert len(deployment.requests("inbox_sensor")) == 1


def test_jobs_pause_the_queue_and_let_it_go_on(deploy):
    deployment = deploy()
    config = {"ops": {"pause_the_queue": {"config": {"reason": "because"}}}}

    paused = deployment.run(dg.RunRequest(job_name="pause_queue"), run_config=config)

    assert paused.success
    assert queue_pause.read_pause(deployment.folder).reason == "because"
    assert deployment.run(dg.RunRequest(job_name="resume_queue")).success
    assert queue_pause.read_pause(deployment.folder) is None


def test_a_change_of_reason_is_observed_once_and_not_at_each_tick(deploy):
    deployment = deploy()
    deployment.admit("a.jsonl", make_input(3))
    deployment.tick("dispatch_sensor")
    before = len(observations(deployment))
    pause(deployment)

    for _ in range(3):
        deployment.tick("dispatch_sensor")

    assert observations(deployment)[: -before or None] == ["paused"]
    queue_pause.unpause(deployment.folder)
    deployment.tick("dispatch_sensor")
    assert observations(deployment)[0] == "none"


def test_the_overview_is_a_table_that_is_not_written_at_each_tick(deploy):
    deployment = deploy()
    batch_id = deployment.admit("a.jsonl", make_input(3))

    for _ in range(3):
        deployment.tick("dispatch_sensor")

    key = dg.AssetKey("queue_overview")
    records = deployment.instance.fetch_materializations(key, limit=10).records
    (materialization,) = [record.asset_materialization for record in records]
    table = materialization.metadata["queue"].value
    assert f"| 1 | {batch_id} | inbox | 0 |" in table


def test_a_damaged_queue_file_is_replaced(deploy):
    deployment = deploy()
    deployment.admit("a.jsonl", make_input(3))
    deployment.folder.queue.write_bytes(b"{torn")

    deployment.tick("dispatch_sensor")

    assert len(json.loads(deployment.folder.queue.read_bytes())["entries"]) == 1


def test_nobody_knows_when_the_turn_comes_behind_what_has_no_estimate(deploy):
    deployment = deploy()
    for name, requests in (("a", 1), ("b", 2), ("c", 3)):
        deployment.admit(f"{name}.jsonl", make_input(requests))
    deployment.tick("dispatch_sensor")
    view: QueueView = queue_files.read_queue(deployment.folder)
    entries = (
        msgspec.structs.replace(entry, engine_seconds=seconds)
        for entry, seconds in zip(view.entries, (60.0, None, 10.0), strict=True)
    )

    expected = with_expectations(msgspec.structs.replace(view, entries=tuple(entries))).entries

    assert [entry.expected_start for entry in expected] == [view.at, view.at + 60, None]
    assert [entry.expected_end for entry in expected] == [view.at + 60, None, None]
