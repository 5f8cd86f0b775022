"""Sensors: what they ask for, how often, and what they say when they do not."""

import subprocess
import sys
import time
from contextlib import contextmanager

import dagster as dg
import pytest

from batch_orchestration.defs import sensors
from batch_orchestration.defs.partitions import chunks_by_batch, range_tags
from batch_orchestration.defs.runs import RETRIED_BY_TAG, WILL_RETRY_TAG, known_runs
from batch_orchestration.dispatch.run_planning import RunState
from batch_orchestration.queue.demand import Limits
from batch_orchestration.queue.load import queue_limits, read_rates
from batch_orchestration.queue.rate_limits import Rate, SourceRates
from batch_orchestration.settings import Settings
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.deployment import FAILURE, STARTED

NOT_STARTED = dg.DagsterRunStatus.NOT_STARTED
#: Dagster retries the failed run itself.
WILL_RETRY = {WILL_RETRY_TAG: "true"}


@pytest.fixture
def without_pauses(monkeypatch):
    monkeypatch.setattr("batch_orchestration.dispatch.run_planning.BACKOFF_SECONDS", 0.0)


@contextmanager
def stranger(deployment):
    """Let another process hold the DuckDB file; yield its pid."""
    script = (
        f"import duckdb, time; connection = duckdb.connect({str(deployment.folder.duckdb)!r})\n"
        "print('open', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "open\n"
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def test_a_complete_file_is_claimed_and_its_admission_asked_for(deployment):
    deployment.drop("a.jsonl", make_input(3))

    (request,), (again,) = (deployment.requests("inbox_sensor") for _ in range(2))

    claim_id = request.tags[sensors.CLAIM_TAG]
    assert again.run_key == request.run_key, "until its run shows"
    assert request.run_key == f"{claim_id}#0"
    assert request.run_config["ops"]["admit_claim"]["config"] == {"claim_id": claim_id}
    assert list(deployment.folder.inbox.glob("*.jsonl")) == []


@pytest.mark.parametrize(("status", "tags"), [(STARTED, {}), (FAILURE, WILL_RETRY)])
def test_a_running_or_retried_admission_is_not_asked_for_again(deployment, status, tags):
    deployment.drop("a.jsonl", make_input(3))
    deployment.pretend(deployment.requests("inbox_sensor")[0], status, **tags)

    assert "a.jsonl: being admitted" in deployment.reason("inbox_sensor")


def test_a_failed_admission_is_tried_again_later_with_another_key(deployment, monkeypatch):
    deployment.drop("a.jsonl", make_input(3))
    (first,) = deployment.requests("inbox_sensor")
    deployment.pretend(first, FAILURE)

    reason = deployment.reason("inbox_sensor")
    monkeypatch.setattr(sensors, "backoff_left", lambda *_, **__: 0.0)
    (second,) = deployment.requests("inbox_sensor")

    assert "1 admissions failed; the next in" in reason
    assert second.run_key == first.run_key.replace("#0", "#1")


def test_a_skipped_tick_says_what_waits_and_why(deploy):
    deployment = deploy(settle_seconds=60.0)
    deployment.drop("growing.jsonl", make_input(3))
    deployment.drop("notes.txt", b"")

    reason = deployment.reason("inbox_sensor")

    assert "growing.jsonl: still being written" in reason
    assert "notes.txt: " in reason


def test_an_empty_inbox_says_where_it_is(deployment):
    assert str(deployment.folder.inbox) in deployment.reason("inbox_sensor")


def test_an_admitted_batch_is_dispatched_in_runs_of_consecutive_chunks(deploy):
    deployment = deploy(chunks_per_run=2)
    batch_id = deployment.admit("a.jsonl", make_input(12))

    first, second = deployment.requests("dispatch_sensor")

    assert first.job_name == second.job_name == "answer_chunks"
    assert first.tags["batch"] == batch_id
    assert first.tags["dagster/asset_partition_range_start"] == f"{batch_id}/00000"
    assert first.tags["dagster/asset_partition_range_end"] == f"{batch_id}/00001"
    assert second.tags["dagster/asset_partition_range_start"] == f"{batch_id}/00002"
    assert first.run_key != second.run_key


@pytest.mark.parametrize(("status", "tags"), [(STARTED, {}), (FAILURE, WILL_RETRY)])
def test_runs_that_are_live_or_retried_are_not_asked_for_again(deployment, status, tags):
    deployment.admit("a.jsonl", make_input(12))
    deployment.pretend(deployment.requests("dispatch_sensor")[0], status, **tags)

    assert deployment.reason("dispatch_sensor") == "batches at work: 1"


def test_a_single_chunk_launched_by_a_person_counts_as_live(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    tags = {"dagster/partition": f"{batch_id}/00000"}
    by_hand = dg.RunRequest(job_name="answer_chunks", tags=tags)
    deployment.pretend(by_hand, STARTED)

    (request,) = deployment.requests("dispatch_sensor")

    assert request.tags["dagster/asset_partition_range_start"] == f"{batch_id}/00001"


def test_a_run_whose_retry_exists_is_not_counted(deployment):
    deployment.admit("a.jsonl", make_input(12))
    (request,) = deployment.requests("dispatch_sensor")
    deployment.pretend(request, FAILURE, **WILL_RETRY, **{RETRIED_BY_TAG: "other"})

    assert deployment.requests("dispatch_sensor")[0].run_key == request.run_key


def test_a_retry_that_appears_between_two_reads_of_the_runs_is_seen(deployment, monkeypatch):
    deployment.admit("a.jsonl", make_input(12))
    (request,) = deployment.requests("dispatch_sensor")
    instance, read = deployment.instance, dg.DagsterInstance.get_run_records

    def read_and_retry(self, filters, *args, **kwargs):
        found = read(self, filters, *args, **kwargs)
        if filters.statuses and STARTED in filters.statuses and not retries:
            retries.append(deployment.pretend(request, STARTED))
            tags = {**WILL_RETRY, RETRIED_BY_TAG: retries[0].run_id}
            deployment.pretend(request, FAILURE, **tags)
        return found

    retries: list[dg.DagsterRun] = []
    monkeypatch.setattr(dg.DagsterInstance, "get_run_records", read_and_retry)

    assert deployment.reason("dispatch_sensor") == "batches at work: 1"
    assert len(instance.get_runs()) == 3  # with that of the admission


def test_a_retry_that_dagster_made_and_could_not_queue_does_not_hold_up_the_batch(deployment):
    deployment.admit("a.jsonl", make_input(12))
    (request,) = deployment.requests("dispatch_sensor")
    instance, job = deployment.instance, deployment.repository.get_job(request.job_name)
    parent = deployment.pretend(request, FAILURE)
    retry = instance.create_run_for_job(job, status=NOT_STARTED, tags=parent.tags)
    instance.add_run_tags(parent.run_id, {RETRIED_BY_TAG: retry.run_id, WILL_RETRY_TAG: "false"})
    names = [path.name for path in deployment.folder.batches.iterdir()]

    soon = known_runs(instance, names, now=time.time())
    later = known_runs(instance, names, now=time.time() + 86_400)

    assert {run.state for run in soon} == {RunState.FAILED, RunState.LIVE}
    assert {run.state for run in later} == {RunState.FAILED}


def test_a_failed_run_is_followed_by_a_later_attempt(deployment, without_pauses):
    deployment.admit("a.jsonl", make_input(12))
    (request,) = deployment.requests("dispatch_sensor")
    deployment.pretend(request, FAILURE)

    (again,) = deployment.requests("dispatch_sensor")

    assert again.run_key == request.run_key.replace("#0", "#1")
    assert again.tags == request.tags


def test_higher_priority_comes_first(deployment):
    deployment.drop("low.jsonl", make_input(3))
    deployment.drop("high.jsonl", make_input(4))
    deployment.drop("high.jsonl.meta.json", b'{"priority": 5}')
    for request in deployment.requests("inbox_sensor"):
        assert deployment.run(request).success

    first, second = deployment.requests("dispatch_sensor")

    assert first.tags["batch"].startswith("high-")
    assert (first.tags["dagster/priority"], second.tags["dagster/priority"]) == ("5", "0")


def test_a_locked_store_is_told_and_fails_nothing(deployment, monkeypatch):
    monkeypatch.setattr(sensors, "STORE_DEADLINE_SECONDS", 0.2)
    deployment.admit("a.jsonl", make_input(3))

    with stranger(deployment) as pid:
        reason = deployment.reason("dispatch_sensor")

    assert "the store cannot be read now" in reason
    assert str(pid) in reason


def test_partitions_that_got_lost_are_made_again(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    deployment.instance.delete_dynamic_partition("batches", batch_id)
    for key in deployment.instance.get_dynamic_partitions("chunks"):
        deployment.instance.delete_dynamic_partition("chunks", key)

    (request,) = deployment.requests("dispatch_sensor")

    assert request.tags["batch"] == batch_id
    assert deployment.instance.get_dynamic_partitions("batches") == [batch_id]
    assert len(deployment.instance.get_dynamic_partitions("chunks")) == 3


def test_a_batch_that_is_just_being_admitted_is_left_to_its_admission(deployment):
    batch_id = deployment.admit("a.jsonl", make_input(12))
    deployment.drop("b.jsonl", make_input(3))
    (admission,) = deployment.requests("inbox_sensor")
    deployment.instance.delete_dynamic_partition("batches", batch_id)
    deployment.pretend(admission, STARTED)

    assert deployment.requests("dispatch_sensor") == []
    assert deployment.instance.get_dynamic_partitions("batches") == []


def test_nothing_to_do_is_said_so(deployment):
    assert deployment.reason("dispatch_sensor") == "no unfinished batch"


@pytest.mark.parametrize(
    ("tags", "chunks"),
    [
        ({}, {}),
        ({"dagster/partition": "a-1"}, {}),
        ({"dagster/partition": "a-1/00007"}, {"a-1": range(7, 8)}),
        (range_tags("a-1", range(2, 5)), {"a-1": range(2, 5)}),
    ],
)
def test_tags_tell_which_chunks_a_run_is_about(tags, chunks):
    assert chunks_by_batch(tags) == chunks


def test_a_range_across_batches_covers_the_end_of_one_and_the_start_of_the_other():
    tags = {
        "dagster/asset_partition_range_start": "a-1/00003",
        "dagster/asset_partition_range_end": "b-2/00001",
    }

    work = chunks_by_batch(tags)

    assert 2 not in work["a-1"]
    assert {3, 99_999} <= set(work["a-1"])
    assert work["b-2"] == range(2)


# --- room -----------------------------------------------------------------------------------------


def test_a_default_installation_has_limits(deployment):
    """A limit that has to be switched on protects nobody."""
    assert queue_limits(Settings.model_construct()) == Limits(
        unfinished_batches=5,
        queued_requests=100_000,
        queued_tokens=1_000_000_000,
        disk_reserve_bytes=2 * 2**30,
        output_bytes_ratio=3.0,
        open_requests=50_000,
    )
    assert read_rates(deployment.store, Settings.model_construct(), now=0.0) == SourceRates(
        submissions=Rate(per_hour=60, burst=20), requests=Rate(per_hour=400_000, burst=200_000)
    )


def test_by_default_the_sixth_batch_waits_and_the_tick_says_why(deployment):
    for number in range(6):
        deployment.drop(f"{number}.jsonl", make_input(number + 1))

    first = deployment.requests("inbox_sensor")
    again = deployment.requests("inbox_sensor")
    for request in first:
        assert deployment.run(request).success

    assert [request.run_key for request in again] == [request.run_key for request in first]
    assert len(deployment.folder.batch_ids()) == 5
    reason = deployment.reason("inbox_sensor")
    assert reason == "5.jsonl: queue_full, 5 batches are unfinished; 5 may be at a time"


def test_a_file_without_room_waits_in_the_inbox_and_is_not_claimed_again(deploy):
    deployment = deploy(max_requests_per_batch=10, max_queued_requests=10)
    deployment.admit("a.jsonl", make_input(8))
    deployment.drop("b.jsonl", make_input(3))
    (request,) = deployment.requests("inbox_sensor")
    assert deployment.run(request).success

    reasons = {deployment.reason("inbox_sensor") for _ in range(2)}

    (reason,) = reasons
    assert reason.startswith("b.jsonl: requests_queued, its 3 requests and the 8 queued")
    assert (deployment.folder.inbox / "b.jsonl").exists()


def test_without_the_store_nothing_is_claimed(deployment, monkeypatch):
    """Nobody knows then whether there is room."""
    monkeypatch.setattr(sensors, "STORE_DEADLINE_SECONDS", 0.2)
    deployment.admit("a.jsonl", make_input(3))
    deployment.drop("b.jsonl", make_input(4))

    with stranger(deployment):
        reason = deployment.reason("inbox_sensor")

    assert "it is not known whether there is capacity" in reason
    assert (deployment.folder.inbox / "b.jsonl").exists()
    assert len(deployment.requests("inbox_sensor")) == 1
