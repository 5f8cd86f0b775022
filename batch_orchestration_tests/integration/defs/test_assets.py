"""Assets and jobs: what a run reports to Dagster, and what it refuses to do."""

import time

import dagster as dg
import msgspec
import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.defs import runs
from batch_orchestration.defs.partitions import BATCH_TAG, range_tags
from batch_orchestration.defs.runs import ASKS_PERSON_TAG, PARTIAL_TAG, mark_partial
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.inference.run import run_chunks
from batch_orchestration.queue.entries import QueueView
from batch_orchestration.settings import EngineKind
from batch_orchestration_tests.support.builders import make_input, make_line
from batch_orchestration_tests.support.deployment import FAILURE, STARTED, materializations
from batch_orchestration_tests.support.scripted_engine import PacedEngine
from batch_orchestration_tests.support.workbench import make_policy, queued


def chunk_run(batch_id, numbers, *, batch_tag=True, **tags):
    own = {BATCH_TAG: batch_id} if batch_tag else {}
    return dg.RunRequest(
        job_name="answer_chunks", tags={**own, **range_tags(batch_id, numbers), **tags}
    )


def show_queue(deployment, *batch_ids):
    """A queue in which each is a point more urgent than the one after it."""
    entries = [
        queued(deployment.folder.read_plan(batch_id), effective=-place)
        for place, batch_id in enumerate(batch_ids)
    ]
    view = QueueView(at=time.time(), entries=tuple(entries))
    deployment.folder.queue.write_bytes(msgspec.json.encode(view))


def test_a_run_reports_what_it_serves_of_a_more_urgent_batch(deploy):
    """Its partitions, and how far it is; and it can be delivered at once."""
    # Else all requests are at the engine before the run knows what is left of the urgent batch.
    deployment = deploy(in_flight=8)
    big = deployment.admit("big.jsonl", make_input(100))
    urgent = deployment.admit("urgent.jsonl", make_input(12))
    (deployment.folder.root / "simulated.json").write_text('{"latency_seconds": 0.3}')
    show_queue(deployment, urgent, big)

    result = deployment.run(chunk_run(big, range(20)))

    assert result.success
    told = materializations(result)
    assert [key for key in told if urgent in key] == [f"{urgent}/{n:05d}" for n in range(3)]
    assert len(told) == 23
    assert deployment.store.batch(urgent).pending == 0
    assert len(observations(result, urgent)) == 3
    delivery = [r for r in deployment.requests("dispatch_sensor") if r.partition_key == urgent]
    assert len(delivery) == 1


def test_what_was_committed_but_never_told_is_told_at_delivery(deployment):
    """The run that served it for another batch was killed in between."""
    batch_id = deployment.admit("a.jsonl", make_input(12))
    plan = deployment.folder.read_plan(batch_id)
    run = RunContext(
        engine=PacedEngine(seconds=0),
        folder=deployment.folder,
        store=deployment.store,
        run_id="killed",
        policy=make_policy(answer_settings=plan.settings),
    )
    for _ in run_chunks({batch_id: range(3)}, run):
        pass
    assert deployment.statuses("chunk_results") == set()

    (request,) = deployment.requests("dispatch_sensor")
    result = deployment.run(request)

    assert result.success
    assert deployment.statuses("chunk_results") == set(plan.chunk_keys)
    assert {chunk["committed_by_run"] for chunk in materializations(result).values()} == {"killed"}


def test_an_admitted_file_becomes_a_batch_with_its_partitions(deployment):
    deployment.drop("some file.jsonl", make_input(12) + b"not json\n")
    (request,) = deployment.requests("inbox_sensor")

    result = deployment.run(request)

    ((batch_id, metadata),) = materializations(result, "batch_manifest").items()
    assert deployment.instance.get_dynamic_partitions("batches") == [batch_id]
    assert deployment.instance.get_dynamic_partitions("chunks") == [
        f"{batch_id}/{number:05d}" for number in range(3)
    ]
    assert (metadata["requests"], metadata["faulty"], metadata["chunks"]) == (13, 1, 3)
    assert metadata["input_file"] == str(deployment.folder.input_path(batch_id))


def test_an_admission_that_runs_twice_leaves_one_batch(deployment):
    deployment.drop("a.jsonl", make_input(3))
    (request,) = deployment.requests("inbox_sensor")

    assert deployment.run(request).success
    assert deployment.run(request).success

    assert len(deployment.instance.get_dynamic_partitions("chunks")) == 1
    assert len(deployment.store.batches()) == 1


def test_a_rejected_file_ends_as_a_successful_run_without_a_batch(deployment):
    deployment.drop("a.jsonl", b"not json at all\n")
    (request,) = deployment.requests("inbox_sensor")

    assert deployment.run(request).success

    assert deployment.store.batches() == []
    assert (deployment.folder.rejected / "a.jsonl").exists()


def observations(result, batch_id):
    """The progress that a run has reported of a batch."""
    found = [e.asset_observation_data.asset_observation for e in result.all_events
             if e.is_asset_observation]  # fmt: skip
    return [observation for observation in found if observation.partition == batch_id]


def test_each_chunk_is_reported_once_with_figures_that_plot(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12) + b"not json\n")

    result = deployment.run(chunk_run(batch_id, range(3)))

    assert result.success
    reported = materializations(result)
    assert sorted(reported) == [f"{batch_id}/{number:05d}" for number in range(3)]
    last = reported[f"{batch_id}/00002"]
    assert (last["dagster/partition_row_count"], last["completed"], last["failed"]) == (3, 2, 1)
    assert last["engine"] == "simulated"
    numbers = ("prompt_tokens", "completion_tokens", "attempts", "duration_seconds")
    assert all(isinstance(last[name], int | float) and last[name] > 0 for name in numbers)
    assert last["requests_per_second"] > 0
    assert last["settings_hash"] == deployment.store.batch(batch_id).settings_hash
    assert last["window"] == 290
    assert last["derivation"].startswith("- window 290 = 256 running (256 sequences at")
    observed = [observation.metadata for observation in observations(result, batch_id)]
    assert [progress["total"].value for progress in observed] == [13] * 3
    assert observed[-1]["done"].value == 13
    logs = deployment.folder.logs / "engines"
    assert (logs / f"{result.run_id}.log").exists()
    assert list(logs.glob("*.process.json")) == [], "the engine ends with its run"


def test_committed_chunks_are_reported_again_without_asking_the_engine(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    first = deployment.run(chunk_run(batch_id, range(2)))

    again = deployment.run(chunk_run(batch_id, range(2)))

    reported = materializations(again)
    assert len(reported) == 2
    assert {metadata["committed_by_run"] for metadata in reported.values()} == {first.run_id}
    assert not (deployment.folder.logs / "engines" / f"{again.run_id}.log").exists()


def test_a_range_that_reaches_into_another_batch_stays_in_its_own(deployment):
    first = deployment.admit("a.jsonl", make_input(7))
    second = deployment.admit("b.jsonl", make_input(8))
    request = dg.RunRequest(
        job_name="answer_chunks",
        tags={
            BATCH_TAG: first,
            **range_tags(first, range(1, 2)),
            "dagster/asset_partition_range_end": f"{second}/00000",
        },
    )

    result = deployment.run(request)

    assert set(materializations(result)) == {f"{first}/00001"}


def test_a_run_that_a_person_launched_gets_the_tag_of_its_batch(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(2))

    result = deployment.run(chunk_run(batch_id, range(1), batch_tag=False))

    assert deployment.instance.get_run_by_id(result.run_id).tags[BATCH_TAG] == batch_id


def other_engine_args():
    """What the launchpad sends when a person edits one field of the resource."""
    return {"resources": {"gpu": {"config": {"flags": {"seed": 7}}}}}


def test_other_settings_stop_the_run_and_show_the_difference(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(2))

    result = deployment.run(chunk_run(batch_id, range(1)), run_config=other_engine_args())

    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert (
        "engine_args: {} → {'seed': 7}" in failure.step_failure_data.user_failure_data.description
    )
    assert ASKS_PERSON_TAG in deployment.instance.get_run_by_id(result.run_id).tags
    assert "waits for a person" in deployment.reason("dispatch_sensor")


def test_a_forced_run_goes_on_with_other_settings(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(2))
    config = {**other_engine_args(), "ops": {"chunk_results": {"config": {"force": True}}}}

    result = deployment.run(chunk_run(batch_id, range(1)), run_config=config)

    (metadata,) = materializations(result).values()
    assert metadata["settings_hash"] != deployment.store.batch(batch_id).settings_hash


def test_an_engine_that_does_not_come_up_is_tried_thrice_then_left_to_dispatch(deploy, monkeypatch):
    monkeypatch.setattr(runs, "STEP_RETRY_SECONDS", 0)
    deployment = deploy(
        engine=EngineKind.REMOTE,
        base_url="http://127.0.0.1:9",
        engine_start_timeout_seconds=0.2,
    )
    batch_id = deployment.admit("a.jsonl", make_input(2))

    result = deployment.run(chunk_run(batch_id, range(1)))

    assert not result.success
    assert len([event for event in result.all_events if event.is_step_restarted]) == 2
    assert "next attempt in" in deployment.reason("dispatch_sensor")


def test_the_output_carries_report_files_and_checks(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12) + b"not json\n")
    deployment.run(chunk_run(batch_id, range(3)))
    (request,) = deployment.requests("dispatch_sensor")

    result = deployment.run(request)

    assert result.success
    metadata = materializations(result, "batch_output")[batch_id]
    assert (metadata["completed"], metadata["failed"]) == (12, 1)
    assert batch_id in metadata["report"]
    assert metadata["output_file"].endswith("output.jsonl")
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    assert checks["every_request_has_an_outcome"].passed
    assert not checks["failure_rate_within_budget"].passed
    assert checks["failure_rate_within_budget"].severity is dg.AssetCheckSeverity.WARN
    assert deployment.store.batch(batch_id).status is BatchStatus.COMPLETED
    assert deployment.statuses("batch_output") == {batch_id}


def delivery(batch_id):
    return dg.RunRequest(
        job_name="deliver_batch", partition_key=batch_id, tags={BATCH_TAG: batch_id}
    )


def outbox(deployment, batch_id):
    return {path.name for path in deployment.folder.outbox_path(batch_id).iterdir()}


def test_output_of_an_unfinished_batch_is_partial_and_changes_nothing(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12) + b"not json\n")
    deployment.run(chunk_run(batch_id, range(1)))
    before = deployment.store.batch(batch_id)

    result = deployment.run(delivery(batch_id))

    assert result.success
    metadata = materializations(result, "batch_output")[batch_id]
    assert (metadata["partial"], metadata["done"], metadata["total"]) == (True, 6, 13)
    assert (metadata["completed"], metadata["failed"]) == (5, 1)
    assert outbox(deployment, batch_id) == {"output.partial.jsonl", "errors.partial.jsonl"}
    (check, _) = result.get_asset_check_evaluations()
    assert (check.passed, check.description) == (True, "partial: 5 + 1 = 6 of 13")
    assert deployment.store.batch(batch_id) == before

    # Nor does it stand in for the delivery.
    deployment.run(chunk_run(batch_id, range(1, 3)))
    (request,) = deployment.requests("dispatch_sensor")
    result = deployment.run(request)

    assert request.job_name == "deliver_batch"
    metadata = materializations(result, "batch_output")[batch_id]
    assert (metadata["partial"], metadata["completed"]) == (False, 12)
    files = {"output.jsonl", "errors.jsonl", "report.md", "report.html"}
    assert outbox(deployment, batch_id) == files
    assert deployment.store.batch(batch_id).status is BatchStatus.COMPLETED


def test_a_partial_output_that_still_runs_or_failed_does_not_hold_up_the_delivery(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    deployment.run(chunk_run(batch_id, range(3)))
    for status in (STARTED, FAILURE):
        run = deployment.pretend(delivery(batch_id), status)
        mark_partial(deployment.instance, run.run_id)

    (request,) = deployment.requests("dispatch_sensor")

    assert request.job_name == "deliver_batch"


def test_a_partial_run_that_is_executed_again_at_the_end_is_the_delivery(deployment):
    """A re-execution inherits the tags of its parent."""
    batch_id = deployment.admit("a.jsonl", make_input(12))
    deployment.run(chunk_run(batch_id, range(3)))
    deployment.pretend(delivery(batch_id), STARTED, **{PARTIAL_TAG: "the-parent"})

    assert deployment.reason("dispatch_sensor") == "batches at work: 1"


def test_a_submitted_file_arrives_with_what_was_said_of_it(deployment, tmp_path):
    path = tmp_path / "elsewhere.jsonl"
    path.write_bytes(make_line(0))
    options = {"priority": 3, "model": "simulated-model", "metadata": {"ticket": "7"}}

    assert deployment.launch("submit_batch", path=str(path), **options).success

    (request,) = deployment.requests("inbox_sensor")
    deployment.run(request)
    (batch,) = deployment.store.batches()
    assert (batch.options.priority, batch.options.model) == (3, "simulated-model")
    assert batch.options.metadata == {"ticket": "7"}
    (needed,) = deployment.requests("dispatch_sensor")
    assert needed.tags["dagster/priority"] == "3"
    assert needed.tags["model"] == "simulated-model"


@pytest.mark.parametrize(
    ("path", "options"),
    [("missing.jsonl", {}), ("there.jsonl", {"priority": 5000}), ("there.txt", {})],
)
def test_a_bad_submission_fails_with_words(deployment, tmp_path, path, options):
    (tmp_path / "there.jsonl").write_bytes(make_line(0))
    (tmp_path / "there.txt").write_bytes(make_line(0))

    result = deployment.launch("submit_batch", path=str(tmp_path / path), **options)

    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert path in failure.step_failure_data.user_failure_data.description
    assert list(deployment.folder.inbox.glob("*.jsonl")) == []
