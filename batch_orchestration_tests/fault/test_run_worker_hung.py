"""Run workers that are there and of no use: stopped, blocked, zombies."""

import pytest

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
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.dagster_processes import dagster_dev, kill, wait_until

REQUESTS = 90
QUICK = {
    "BATCH_REQUESTS_PER_CHUNK": "30",
    "BATCH_IN_FLIGHT": "4",
    "BATCH_HEARTBEAT_SECONDS": "0.5",
    "BATCH_SILENT_SECONDS": "4",
}


@pytest.mark.slow
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
