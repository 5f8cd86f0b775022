"""`kill -9` of Dagster's processes: all at once, as a power cut would, or the daemon alone."""

from batch_orchestration_tests.builders import make_input
from batch_orchestration_tests.fault.accidents import (
    SLOW_SECONDS,
    assert_undisturbed,
    durable_outcomes,
    wait_for_answering,
    wait_for_outcomes,
)
from batch_orchestration_tests.integration.dagster_processes import dagster_dev, wait_until

REQUESTS = 60


def test_after_everything_was_killed_a_restart_finishes_the_batch(tmp_path):
    with dagster_dev(tmp_path, BATCH_REQUESTS_PER_CHUNK="20", BATCH_IN_FLIGHT="4") as dagster:
        dagster.simulate(latency_seconds=SLOW_SECONDS)
        dagster.drop("a.jsonl", make_input(REQUESTS))
        batch_id = dagster.wait_for_batch("a")
        lost = wait_for_answering(dagster, batch_id)
        wait_for_outcomes(dagster, batch_id, 25)

        dagster.kill_everything()
        before = durable_outcomes(dagster, batch_id)
        dagster.simulate(latency_seconds=0.1)
        dagster.start()

        dagster.wait_for_status(batch_id, "completed")
        assert 25 <= len(before) < REQUESTS
        assert_undisturbed(dagster, batch_id, REQUESTS, before)
        runs = {run.run_id: run for run in dagster.runs("answer_chunks", batch=batch_id)}
        assert runs.pop(lost.run_id).status == "FAILURE"
        assert [run.status for run in runs.values()] == ["SUCCESS"]


def test_a_run_goes_on_while_dagster_is_gone(tmp_path):
    """`dagster dev` gives up when its daemon dies; the run worker does not notice."""
    with dagster_dev(tmp_path, BATCH_REQUESTS_PER_CHUNK="20", BATCH_IN_FLIGHT="4") as dagster:
        dagster.simulate(latency_seconds=SLOW_SECONDS)
        dagster.drop("a.jsonl", make_input(REQUESTS))
        batch_id = dagster.wait_for_batch("a")
        run = wait_for_answering(dagster, batch_id)
        wait_for_outcomes(dagster, batch_id, 5)

        dagster.kill_daemon()
        before = durable_outcomes(dagster, batch_id)
        dagster.simulate(latency_seconds=0.1)
        wait_until(lambda: not dagster.is_up(), 60, "dagster dev is gone")
        wait_until(lambda: len(dagster.store.chunk_reports(batch_id)) == 3, 60, "all is committed")
        dagster.start()

        dagster.wait_for_status(batch_id, "completed")
        assert len(before) < REQUESTS
        assert_undisturbed(dagster, batch_id, REQUESTS, before)
        (answering,) = dagster.runs("answer_chunks", batch=batch_id)
        assert (answering.run_id, answering.status) == (run.run_id, "SUCCESS")


def test_the_daemon_killed_in_the_middle_of_admission_loses_and_doubles_no_file(tmp_path):
    """The files are claimed; nobody knows how far their runs were asked for."""
    with dagster_dev(tmp_path, BATCH_REQUESTS_PER_CHUNK="20") as dagster:
        sizes = {f"file-{number}": 20 + number for number in range(3)}
        for name, requests in sizes.items():
            dagster.drop(f"{name}.jsonl", make_input(requests))
        claims = dagster.folder.claims
        wait_until(lambda: len(list(claims.glob("file-*/*.jsonl"))) == 3, 60, "all are claimed")

        dagster.kill_daemon()
        wait_until(lambda: not dagster.is_up(), 60, "dagster dev is gone")
        dagster.start()

        for name in sizes:
            dagster.wait_for_status(dagster.wait_for_batch(name), "completed")
        admitted = {batch.file_name: batch.total for batch in dagster.store.batches()}
        assert admitted == {f"{name}.jsonl": requests for name, requests in sizes.items()}
        assert not list(dagster.folder.inbox.glob("*.jsonl"))
        assert not list(claims.glob("file-*"))
