"""What is cleared away and taken up again while no run is there that would do it."""

import os
import subprocess

import dagster as dg
import msgspec
import pytest

from batch_orchestration.defs import recovery
from batch_orchestration.dispatch.run_planning import MAX_FAILURES
from batch_orchestration.engines.processes.records import (
    ProcessIdentity,
    ProcessRecord,
    identify,
    is_running,
    write_record,
)
from batch_orchestration.queue.files import read_needs_attention
from batch_orchestration.workers.cleanup import WORKER_TAG, RecordedWorker
from batch_orchestration.workers.heartbeat import Heartbeat
from batch_orchestration.workers.heartbeat_files import write_heartbeat
from batch_orchestration_tests.fault.processes import FAMILY, kill, nobody, wait_for_group
from batch_orchestration_tests.support.builders import NOW, make_input
from batch_orchestration_tests.support.deployment import STARTED, memory_instance

RUN_ID = "11111111-2222-3333-4444-555555555555"


@pytest.fixture
def family():
    process = subprocess.Popen(FAMILY, start_new_session=True)
    members = wait_for_group(process.pid, 3)
    yield members
    for member in members:
        kill(member)
    process.wait()


def leave_engine(deployment, members, *, owner):
    path = deployment.folder.engine_record_path(RUN_ID)
    record = ProcessRecord(
        leader=members[0], owner=owner, members=tuple(members[1:]), command=("vllm",)
    )
    write_record(path, record)
    return path


def add_run(deployment, status, *, worker: ProcessIdentity | None, run_id: str | None = None):
    """Let Dagster know a run in this state, and who works on it."""
    job = deployment.repository.get_job("pause_queue")
    run = deployment.instance.create_run_for_job(job, status=status)
    if worker is not None:
        record = RecordedWorker(worker.pid, worker.started, worker.boot_id, run_id or run.run_id)
        tags = {WORKER_TAG: msgspec.json.encode(record).decode()}
        deployment.instance.add_run_tags(run.run_id, tags)
    return run.run_id


def status_of(deployment, run_id):
    return deployment.instance.get_run_by_id(run_id).status


def beat_as(deployment, run_id, worker):
    heartbeat = Heartbeat(
        run_id=run_id,
        job="answer_chunks",
        at=NOW,
        phase="feeding",
        progress_at=NOW,
        patience_seconds=60.0,
        **msgspec.structs.asdict(worker),
    )
    path = deployment.folder.heartbeat_path(run_id)
    write_heartbeat(path, heartbeat)
    return path


def test_an_engine_whose_worker_is_gone_is_ended_while_nothing_runs(deployment, family):
    """It would hold its memory until a next run begins, which may be next week."""
    record = leave_engine(deployment, family, owner=nobody())

    reason = deployment.reason("recovery_sensor")

    assert reason == f"ended the engine left by run {RUN_ID}"
    assert not any(is_running(member) for member in family)
    assert not record.exists()


def test_an_engine_whose_worker_runs_is_not_touched(deployment, family):
    record = leave_engine(deployment, family, owner=identify(os.getpid()))

    assert deployment.reason("recovery_sensor") == "there was nothing to clean up"

    assert all(is_running(member) for member in family)
    assert record.exists()


@pytest.mark.parametrize("field", ["boot_id", "started"])
def test_whoever_has_got_the_pids_of_an_earlier_boot_is_not_touched(deployment, family, field):
    before = {"boot_id": "an-earlier-boot"} if field == "boot_id" else {"started": 1}
    members = [msgspec.structs.replace(member, **before) for member in family]
    record = leave_engine(deployment, members, owner=nobody())

    assert deployment.reason("recovery_sensor") == "there was nothing to clean up"

    assert all(is_running(member) for member in family)
    assert not record.exists()


def test_a_run_whose_worker_died_while_it_started_fails_at_the_next_tick(deployment):
    """Dagster's monitoring only looks at these after five minutes."""
    lost = add_run(deployment, dg.DagsterRunStatus.STARTING, worker=nobody())
    living = add_run(deployment, dg.DagsterRunStatus.STARTING, worker=identify(os.getpid()))
    young = add_run(deployment, dg.DagsterRunStatus.STARTING, worker=None)
    retry = add_run(deployment, dg.DagsterRunStatus.STARTING, worker=nobody(), run_id=lost)

    reason = deployment.reason("recovery_sensor")

    assert lost in reason
    assert status_of(deployment, lost) is dg.DagsterRunStatus.FAILURE
    for run_id in (living, young, retry):
        assert status_of(deployment, run_id) is dg.DagsterRunStatus.STARTING


def test_a_run_that_never_got_a_worker_fails_when_none_can_come_any_more(deployment, monkeypatch):
    """The daemon died before it started one; one that was started and not recorded beats."""
    heartbeats_written = add_run(deployment, dg.DagsterRunStatus.STARTING, worker=None)
    beat_as(deployment, heartbeats_written, identify(os.getpid()))
    without = add_run(deployment, dg.DagsterRunStatus.STARTING, worker=None)
    monkeypatch.setattr(recovery, "RECORD_SECONDS", -1.0)

    assert without in deployment.reason("recovery_sensor")

    assert status_of(deployment, without) is dg.DagsterRunStatus.FAILURE
    assert status_of(deployment, heartbeats_written) is dg.DagsterRunStatus.STARTING


def test_a_heartbeat_that_nobody_can_read_goes_once_its_run_is_over(deployment):
    """Empty after a power cut: whose it is cannot be told, and it would be silent for ever."""
    over = add_run(deployment, dg.DagsterRunStatus.FAILURE, worker=None)
    at_work = add_run(deployment, dg.DagsterRunStatus.STARTED, worker=None)
    paths = {
        name: deployment.folder.heartbeat_path(name) for name in (over, at_work, RUN_ID, "young")
    }
    deployment.folder.heartbeats.mkdir()
    for name, path in paths.items():
        path.touch()
        if name != "young":
            os.utime(path, (NOW, NOW))

    reason = deployment.reason("recovery_sensor")

    assert over in reason
    assert RUN_ID in reason
    assert [name for name, path in paths.items() if path.exists()] == [at_work, "young"]


def test_a_worker_that_outlives_its_run_is_ended(deployment, family, monkeypatch):
    """One that was canceled while it hung: Dagster gives it up and leaves it where it is."""
    worker = family[0]
    run_id = add_run(deployment, dg.DagsterRunStatus.STARTED, worker=worker)
    heartbeat = beat_as(deployment, run_id, worker)
    assert deployment.reason("recovery_sensor") == "there was nothing to clean up"
    run = deployment.instance.get_run_by_id(run_id)
    deployment.instance.report_run_canceling(run)
    deployment.instance.report_run_canceled(run)

    assert deployment.reason("recovery_sensor") == "there was nothing to clean up"
    assert is_running(worker)
    monkeypatch.setattr(recovery, "END_SECONDS", -1.0)
    assert "outlived" in deployment.reason("recovery_sensor")

    assert not is_running(worker)
    assert not heartbeat.exists()


def test_batches_in_progress_of_which_dagster_knows_no_run_are_asked_for_again(deployment):
    """Level, not edge: their runs may have been wiped, or never have been created."""
    answered = deployment.admit("a.jsonl", make_input(5))
    (request,) = deployment.requests("dispatch_sensor")
    assert deployment.run(request).success
    untouched = deployment.admit("b.jsonl", make_input(7))

    deployment.instance.dispose()
    deployment.instance = memory_instance()

    asked = {request.job_name: request for request in deployment.requests("dispatch_sensor")}
    assert asked["deliver_batch"].partition_key == answered
    assert (asked["answer_chunks"].run_key or "").startswith(untouched)


def test_a_batch_whose_workers_are_ended_again_and_again_ends_at_a_person_not_in_a_loop(deployment):
    """Where `health` and alerts look; and a commit in between would have been another matter."""
    batch_id = deployment.admit("a.jsonl", make_input(5))
    (request,) = deployment.requests("dispatch_sensor")

    for _ in range(MAX_FAILURES):
        run = deployment.pretend(request, STARTED)
        assert read_needs_attention(deployment.folder) in (None, ())
        deployment.instance.report_run_failed(run, "run worker 1 was silent and has been killed")

    assert "waits for a person" in deployment.reason("dispatch_sensor")
    (need,) = read_needs_attention(deployment.folder) or ()
    assert (need.batch_id, need.run_id) == (batch_id, run.run_id)


def test_a_file_whose_admission_is_ended_again_and_again_is_named_to_a_person(deployment):
    """It is tried on, for it has a claim and no batch; but nobody would hear of it."""
    deployment.drop("a.jsonl", make_input(5))
    (request,) = deployment.requests("inbox_sensor")
    for _ in range(MAX_FAILURES):
        run = deployment.pretend(request, STARTED)
        deployment.tick("dispatch_sensor")
        assert read_needs_attention(deployment.folder) == ()
        deployment.instance.report_run_failed(run, "run worker 1 was silent and has been killed")

    deployment.tick("dispatch_sensor")

    (need,) = read_needs_attention(deployment.folder) or ()
    assert (need.batch_id, need.run_id) == ("a.jsonl", run.run_id)
    assert "3 admissions failed; the next in" in deployment.reason("inbox_sensor")
