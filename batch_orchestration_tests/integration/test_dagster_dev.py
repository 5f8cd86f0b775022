"""The three ways to launch, against a real `dagster dev`: inbox, UI, backfill.

One instance for all: starting it costs half a minute on two cores.
"""

import json
import time

import pytest

from batch_orchestration.domain.dead_letters import Selection
from batch_orchestration.services.dead_letters import request_replay
from batch_orchestration.storage.operations import open_replays
from batch_orchestration_tests.builders import make_body, make_input, make_line
from batch_orchestration_tests.integration.dagster_processes import dagster_dev

pytestmark = pytest.mark.timeout(300)

#: The backfill daemon looks once in 30 s, and again when the run has ended.
BACKFILL_SECONDS = 120.0


@pytest.fixture(scope="module")
def dagster(tmp_path_factory):
    root = tmp_path_factory.mktemp("deployment")
    with dagster_dev(root, BATCH_REQUESTS_PER_CHUNK="10", BATCH_IN_FLIGHT="32") as processes:
        yield processes


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def delivered(dagster, batch_id):
    """The custom_ids in output and errors of a finished batch."""
    dagster.wait_for_status(batch_id, "completed")
    outbox = dagster.folder.outbox_path(batch_id)
    return [
        [line["custom_id"] for line in lines(outbox / name)]
        for name in ("output.jsonl", "errors.jsonl")
    ]


def launch_chunks(dagster, *keys, **config):
    """Launch one run over the first to the last of these chunks, as the UI does."""
    tags = (
        {"dagster/partition": keys[0]}
        if len(keys) == 1
        else {
            "dagster/asset_partition_range_start": keys[0],
            "dagster/asset_partition_range_end": keys[-1],
        }
    )
    run_id = dagster.launch("__ASSET_JOB", asset="chunk_results", tags=tags, run_config=config)
    return dagster.wait_for_run(run_id)


def test_a_dropped_file_is_answered_and_delivered(dagster):
    dagster.drop("some file.jsonl", make_input(45) + b"not json\n")

    batch_id = dagster.wait_for_batch("some-file")
    outputs, errors = delivered(dagster, batch_id)

    assert outputs == [f"request-{number}" for number in range(45)]
    assert errors == [None]
    dagster.wait_until(
        lambda: batch_id in dagster.partitions("batch_output")["materialized"], 30, "delivered"
    )
    done = {key for key in dagster.partitions("chunk_results")["materialized"] if batch_id in key}
    assert done == {f"{batch_id}/{number:05d}" for number in range(5)}
    answering = dagster.runs("answer_chunks", batch=batch_id)
    assert len(answering) == 1, "one run, one engine for all chunks of the batch"
    assert not list(dagster.folder.inbox.glob("*.jsonl"))


def test_a_file_submitted_in_the_ui_is_answered_with_its_options(dagster, tmp_path):
    path = tmp_path / "by-hand.jsonl"
    path.write_bytes(make_input(12))
    config = {"path": str(path), "priority": 7, "metadata": {"ticket": "T-1"}}

    run_id = dagster.launch("submit_batch", run_config={"ops": {"submit_file": {"config": config}}})

    assert dagster.wait_for_run(run_id).status == "SUCCESS"
    batch_id = dagster.wait_for_batch("by-hand")
    outputs, errors = delivered(dagster, batch_id)
    assert (len(outputs), len(errors)) == (12, 0)
    assert dagster.store.batch(batch_id).options.metadata == {"ticket": "T-1"}
    assert dagster.runs("answer_chunks", batch=batch_id)[0].tags["dagster/priority"] == "7"
    assert path.exists()


def test_chunks_can_be_launched_one_by_one_and_as_backfills(dagster):
    """With nobody dispatching: a selection, one chunk, one that fails, then all that is left."""
    dagster.switch_sensor("dispatch_sensor", on=False)
    dagster.drop("piecemeal.jsonl", make_input(60))
    batch_id = dagster.wait_for_batch("piecemeal")
    keys = [f"{batch_id}/{number:05d}" for number in range(6)]

    def status(name):
        return dagster.partitions("chunk_results")[name] & set(keys)

    # While the backfill daemon takes its time, the two single chunks.
    selection = dagster.backfill("chunk_results", [keys[3], keys[5]])
    assert launch_chunks(dagster, keys[0]).status == "SUCCESS"
    other = {"resources": {"gpu": {"config": {**gpu_config(), "engine_args": {"seed": 1}}}}}
    assert launch_chunks(dagster, keys[1], **other).status == "FAILURE"
    assert status("failed") == {keys[1]}
    dagster.wait_until(
        lambda: status("materialized") == {keys[0], keys[3], keys[5]}, BACKFILL_SECONDS, "selected"
    )

    rest = sorted(status("failed") | status("missing"))
    assert rest == [keys[1], keys[2], keys[4]]
    failed_and_missing = dagster.backfill("chunk_results", rest)
    dagster.wait_until(
        lambda: status("materialized") == set(keys), BACKFILL_SECONDS, "all is materialized"
    )

    assert dagster.backfill_status(selection) == "COMPLETED_SUCCESS"
    run_of = {n: report.run_id for n, report in dagster.store.chunk_reports(batch_id).items()}
    assert run_of[1] == run_of[2], "neighbours share a run and its engine"
    assert len(dagster.runs(**{"dagster/backfill": failed_and_missing})) == 2
    dagster.switch_sensor("dispatch_sensor", on=True)
    outputs, errors = delivered(dagster, batch_id)
    assert (len(outputs), len(errors)) == (60, 0)


def test_a_terminated_run_stops_at_once_and_waits_to_be_executed_again(dagster):
    dagster.simulate(latency_seconds=1.0)
    dagster.drop("stop-me.jsonl", make_input(300))
    batch_id = dagster.wait_for_batch("stop-me")
    answering = dagster.wait_until(
        lambda: [
            run for run in dagster.runs("answer_chunks", batch=batch_id) if run.status == "STARTED"
        ],
        60,
        "the batch is being answered",
    )[0]
    dagster.wait_until(lambda: dagster.store.chunk_reports(batch_id), 60, "a chunk is committed")

    dagster.terminate(answering.run_id)

    assert dagster.wait_for_run(answering.run_id, seconds=15).status == "CANCELED"
    dagster.wait_until(
        lambda: "waits for a person" in dagster.latest_tick("dispatch_sensor"), 30, "a tick says so"
    )
    assert 0 < len(dagster.store.chunk_reports(batch_id)) < 30
    dagster.simulate()
    dagster.execute_again(answering.run_id)
    outputs, errors = delivered(dagster, batch_id)
    assert (len(outputs), len(errors)) == (300, 0)


def gpu_config():
    return {
        "engine": "simulated",
        "device": "cuda",
        "model": "",
        "served_model_name": "",
        "engine_args": {},
        "base_url": "",
        "api_key": "",
        "start_timeout_seconds": 60.0,
        "request_timeout_seconds": 60.0,
    }


def test_a_replay_that_was_asked_for_elsewhere_is_run_and_delivered(dagster):
    bad = make_line(1, body=make_body("question 1", max_tokens=-1))
    dagster.drop("refused.jsonl", make_line(0) + bad)
    batch_id = dagster.wait_for_batch("refused")
    assert delivered(dagster, batch_id) == [["request-0"], ["request-1"]]

    request_replay(
        batch_id,
        Selection(),
        folder=dagster.folder,
        store=dagster.store,
        actor="tester",
        at=time.time(),
        overrides={"max_tokens": 16},
    )
    dagster.wait_until(lambda: not open_replays(dagster.folder), 90, "the replay is over")

    assert delivered(dagster, batch_id) == [["request-0", "request-1"], []]
    dagster.wait_until(
        lambda: len(dagster.runs("replay_failed_requests", batch=batch_id)) == 1, 30, "one run"
    )
