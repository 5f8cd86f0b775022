"""The three ways to launch, against a real `dagster dev`: inbox, UI, backfill.

One instance for all: starting it costs half a minute on two cores.
"""

import json
import time

import pytest

from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.dead_letters.actions import request_replay
from batch_orchestration.hosting.hosts import end_engines
from batch_orchestration.store.operations import open_replays
from batch_orchestration_tests.support.builders import make_body, make_input, make_line
from batch_orchestration_tests.support.dagster_processes import PATIENCE, dagster_dev

pytestmark = pytest.mark.slow

#: The backfill daemon looks once in 30 s, and again when the run has ended.
BACKFILL_SECONDS = 120.0
#: Of each request of the big batch and of the urgent one: 32 at a time, the big one takes 75 s.
URGENT_LATENCY_SECONDS = 4.0
#: Settling, three ticks of 5 s, two starts of a run worker, a second's look, the requests that are
#: in flight and two windows of the urgent ones; half as much again, for a machine with other work.
URGENT_SECONDS = 1.5 * (0.5 + 3 * 5.0 + 2 * 10.0 + 1.0 + 3 * URGENT_LATENCY_SECONDS)


@pytest.fixture(scope="module")
def dagster(tmp_path_factory):
    root = tmp_path_factory.mktemp("deployment")
    settings = {
        "BATCH_REQUESTS_PER_CHUNK": "10",
        "BATCH_IN_FLIGHT": "32",
        # As by default: one engine serves all of these tests, run after run.
        "BATCH_ENGINE_KEEP_ALIVE": "600",
        # Of ten requests each.
        "BATCH_CHUNKS_PER_RUN": "500",
        # More than any file of these tests, but the one that shall be split.
        "BATCH_MAX_REQUESTS_PER_BATCH": "600",
    }
    with dagster_dev(root, **settings) as processes:
        # For the last test: answered and delivered beside the file of the first.
        bad = make_line(1, body=make_body("question 1", max_tokens=-1))
        processes.drop("refused.jsonl", make_line(0) + bad)
        yield processes
        end_engines(processes.folder, only_idle=False)


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


def test_a_file_above_the_limit_is_answered_window_by_window_and_delivered_as_one(dagster):
    dagster.drop("large.jsonl", make_input(640) + b"not json\n")

    batch_id = dagster.wait_for_batch("large", seconds=150)
    outputs, errors = delivered(dagster, batch_id)

    assert outputs == [f"request-{number}" for number in range(640)]
    assert errors == [None]
    runs = dagster.runs("answer_chunks", batch=batch_id)
    ranges = [run.tags["dagster/asset_partition_range_start"][-5:] for run in runs]
    assert sorted(ranges) == ["00000", "00060"], "600 requests are open at a time"


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
    other = {"resources": {"gpu": {"config": {"flags": {"seed": 1}}}}}
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


def answering_slowly(dagster, name, requests):
    """A batch in the middle of its run: its id, and the run.

    Of 300 requests 32 at a time take 40 s, in which a command starts on the busiest machine.
    """
    dagster.simulate(latency_seconds=4.0)
    dagster.drop(f"{name}.jsonl", make_input(requests))
    batch_id = dagster.wait_for_batch(name)
    running = dagster.wait_until(
        lambda: [
            run for run in dagster.runs("answer_chunks", batch=batch_id) if run.status == "STARTED"
        ],
        60,
        "the batch is being answered",
    )[0]
    dagster.wait_until(
        lambda: dagster.store.chunk_reports(batch_id), 60, "a chunk is committed", look_seconds=0.25
    )
    return batch_id, running.run_id


def assert_delivered_as_cancelled(dagster, batch_id, requests):
    """What was answered is there, the rest are lines of the error file; all chunks are green."""
    dagster.wait_for_status(batch_id, "cancelled", seconds=60)
    outbox = dagster.folder.outbox_path(batch_id)
    output, errors = lines(outbox / "output.jsonl"), lines(outbox / "errors.jsonl")
    assert 0 < len(output) < requests
    assert len(output) + len(errors) == requests
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert "**Cancelled** by" in (outbox / "report.md").read_text()
    keys = {f"{batch_id}/{number:05d}" for number in range(requests // 10)}
    dagster.wait_until(
        lambda: keys <= dagster.partitions("chunk_results")["materialized"], 30, "all are green"
    )
    delivering = dagster.runs("deliver_batch", batch=batch_id)
    assert [run.tags["early_end"] for run in delivering] == ["cancelled"]


def test_a_batch_cancelled_on_the_command_line_lets_go_within_seconds(dagster):
    batch_id, run_id = answering_slowly(dagster, "cancel-me", 300)

    began = time.monotonic()
    said = dagster.command("cancel", batch_id, "--reason", "changed my mind")
    run = dagster.wait_for_run(run_id, seconds=15)
    seconds = time.monotonic() - began

    assert "is being cancelled" in said
    assert run.status == "SUCCESS"
    assert seconds < 60
    print(f"from cancel to the end of the run: {seconds:.1f} s")
    assert_delivered_as_cancelled(dagster, batch_id, 300)
    print(f"from cancel to the files: {time.monotonic() - began:.1f} s")
    cancelling = dagster.store.batch_events(batch_id)[2]
    assert (str(cancelling.to_status), cancelling.reason) == ("cancelling", "changed my mind")


def test_terminating_a_run_in_the_ui_cancels_its_batch(dagster):
    batch_id, run_id = answering_slowly(dagster, "stop-me", 310)

    began = time.monotonic()
    dagster.terminate(run_id)

    assert dagster.wait_for_run(run_id, seconds=15).status == "CANCELED"
    print(f"from terminate to the end of the run: {time.monotonic() - began:.1f} s")
    assert_delivered_as_cancelled(dagster, batch_id, 310)
    print(f"from terminate to the files: {time.monotonic() - began:.1f} s")
    cancelling = dagster.store.batch_events(batch_id)[2]
    assert (str(cancelling.to_status), cancelling.actor) == ("cancelling", run_id)

    dagster.simulate()
    answered_before = lines(dagster.folder.outbox_path(batch_id) / "output.jsonl")
    dagster.command("resume", batch_id)

    outputs, errors = delivered(dagster, batch_id)
    assert (len(outputs), len(errors)) == (310, 0)
    answered = lines(dagster.folder.outbox_path(batch_id) / "output.jsonl")
    assert all(line in answered for line in answered_before), "nothing was asked again"


def test_a_small_urgent_file_overtakes_a_big_batch_within_the_bound(dagster):
    """Without a start of the engine, however much of the big batch is left."""
    dagster.simulate(latency_seconds=URGENT_LATENCY_SECONDS)
    dagster.drop("big.jsonl", make_input(600))
    big = dagster.wait_for_batch("big")
    dagster.wait_until(lambda: dagster.store.chunk_reports(big), 90, "a chunk is committed")

    dropped_at = time.monotonic()
    dagster.drop("high/urgent.jsonl", make_input(40))
    urgent = dagster.wait_for_batch("urgent", seconds=URGENT_SECONDS)
    output = dagster.folder.outbox_path(urgent) / "output.jsonl"
    dagster.wait_until(output.exists, URGENT_SECONDS, "the urgent file is delivered")
    took = time.monotonic() - dropped_at

    print(f"from the drop of the urgent file to its output: {took:.1f} s")
    assert len(lines(output)) == 40
    assert took < PATIENCE * URGENT_SECONDS
    assert dagster.store.batch(big).pending > 0
    answering = {run.run_id for run in dagster.runs("answer_chunks", batch=big)}
    reports = dagster.store.chunk_reports(urgent).values()
    assert {report.run_id for report in reports} <= answering, "by a run of the big batch"
    dagster.simulate()
    dagster.wait_for_status(big, "completed", seconds=200)


def test_a_replay_that_was_asked_for_elsewhere_is_run_and_delivered(dagster):
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
