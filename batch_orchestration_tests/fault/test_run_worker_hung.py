"""Run workers that are there and of no use: stopped, blocked, zombies, of an earlier boot."""

import subprocess

import msgspec

from batch_orchestration.engines.process_records import (
    ProcessRecord,
    identify,
    is_running,
    write_record,
)
from batch_orchestration.services.run_workers import WORKER_TAG, RecordedWorker
from batch_orchestration.storage.heartbeat_files import read_pulse, write_heartbeat
from batch_orchestration_tests.builders import make_input
from batch_orchestration_tests.fault.accidents import (
    assert_undisturbed,
    durable_outcomes,
    wait_for_answering,
    wait_for_outcomes,
)
from batch_orchestration_tests.fault.hanging import (
    inheriting_orphans,
    is_zombie,
    reap,
    stop,
    wait_for_blocked_loop,
)
from batch_orchestration_tests.fault.processes import FAMILY
from batch_orchestration_tests.integration.dagster_processes import (
    dagster_dev,
    kill,
    wait_until,
)

REQUESTS = 90
QUICK = {
    "BATCH_REQUESTS_PER_CHUNK": "30",
    "BATCH_IN_FLIGHT": "4",
    "BATCH_HEARTBEAT_SECONDS": "0.5",
    "BATCH_SILENT_SECONDS": "4",
}


def test_workers_that_hang_are_started_again_and_every_request_is_answered_once(tmp_path):
    """Blocked, then stopped, then a zombie; for none of it the batch is canceled."""
    # No later worker has so many requests left.
    hanging = {"CRASH_POINT": "after_submit:50:hang"}
    with inheriting_orphans(), dagster_dev(tmp_path, **QUICK, **hanging) as dagster:
        dagster.simulate(latency_seconds=0.3)
        dagster.drop("a.jsonl", make_input(REQUESTS))
        batch_id = dagster.wait_for_batch("a")

        blocked = wait_for_answering(dagster, batch_id)
        wait_for_blocked_loop(dagster, blocked)
        dagster.simulate(latency_seconds=1.0)
        before = durable_outcomes(dagster, batch_id)
        stopped = wait_for_answering(dagster, batch_id, but=blocked.run_id)
        wait_for_outcomes(dagster, batch_id, 55)
        stop(dagster.worker(stopped))
        # Else the next one would be done by itself while Dagster is away.
        dagster.simulate(latency_seconds=30.0)
        before = {**durable_outcomes(dagster, batch_id), **before}

        orphan = wait_for_answering(dagster, batch_id, but=stopped.run_id)
        dagster.kill_daemon()
        wait_until(lambda: not dagster.is_up(), 60, "dagster dev is gone")
        worker = dagster.worker(orphan)
        kill(worker)
        wait_until(lambda: is_zombie(worker.pid), 10, "it is a zombie")
        before = {**durable_outcomes(dagster, batch_id), **before}
        dagster.simulate(latency_seconds=0.1)
        dagster.start()

        dagster.wait_for_status(batch_id, "completed")
        assert is_zombie(worker.pid)
        reap(worker.pid)
        assert len(before) < REQUESTS
        assert_undisturbed(dagster, batch_id, REQUESTS, before)
        runs = dagster.runs("answer_chunks", batch=batch_id)
        assert [run.status for run in runs] == ["SUCCESS", "FAILURE", "FAILURE", "FAILURE"]
        stacks = (dagster.folder.logs / "runs" / f"{blocked.run_id}.log").read_text()
        assert "crash_point" in stacks
        wait_until(lambda: not list(dagster.folder.heartbeats.iterdir()), 20, "no heartbeat")


def test_after_a_restart_of_the_machine_nobody_who_has_got_an_old_pid_is_touched(tmp_path):
    """All that is on record is of an earlier boot; its pids are strangers' now."""
    strangers = subprocess.Popen(FAMILY, start_new_session=True)
    with strangers, dagster_dev(tmp_path, **QUICK) as dagster:
        dagster.simulate(latency_seconds=0.3)
        dagster.drop("a.jsonl", make_input(60))
        batch_id = dagster.wait_for_batch("a")
        lost = wait_for_answering(dagster, batch_id)
        heartbeat = dagster.folder.heartbeat_path(lost.run_id)
        beat = dagster.wait_until(lambda: read_pulse(heartbeat), 20, "a heartbeat").heartbeat

        dagster.kill_everything()
        before = durable_outcomes(dagster, batch_id)
        stranger = identify(strangers.pid)
        assert stranger is not None
        earlier = msgspec.structs.replace(stranger, boot_id="an-earlier-boot")
        with dagster.instance() as instance:
            record = RecordedWorker(earlier.pid, earlier.started, earlier.boot_id, lost.run_id)
            instance.add_run_tags(lost.run_id, {WORKER_TAG: msgspec.json.encode(record).decode()})
        who = msgspec.structs.asdict(earlier)
        write_heartbeat(heartbeat, msgspec.structs.replace(beat, **who))
        engine = dagster.folder.engine_record_path(lost.run_id)
        write_record(
            engine, ProcessRecord(leader=earlier, owner=earlier, members=(), command=("vllm",))
        )
        dagster.start()

        dagster.wait_for_status(batch_id, "completed")
        assert is_running(stranger)
        assert not engine.exists()
        assert not heartbeat.exists()
        assert_undisturbed(dagster, batch_id, 60, before)
        assert [run.status for run in dagster.runs("answer_chunks", batch=batch_id)] == [
            "SUCCESS",
            "FAILURE",
        ]
        subprocess.run(["kill", "-9", "--", f"-{strangers.pid}"], check=True)
