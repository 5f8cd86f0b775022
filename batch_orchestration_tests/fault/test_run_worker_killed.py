"""`kill -9` of the run worker in the middle of a chunk: Dagster starts it again by itself."""

from batch_orchestration_tests.builders import make_input
from batch_orchestration_tests.fault.accidents import (
    SLOW_SECONDS,
    assert_undisturbed,
    durable_outcomes,
    wait_for_answering,
    wait_for_outcomes,
)
from batch_orchestration_tests.integration.dagster_processes import dagster_dev, wait_until

REQUESTS = 90


def test_a_killed_run_worker_costs_no_answer_and_needs_nobody(tmp_path):
    """Killed twice: the second time the retry's first chunks come from the store."""
    with dagster_dev(tmp_path, BATCH_REQUESTS_PER_CHUNK="30", BATCH_IN_FLIGHT="4") as dagster:
        dagster.simulate(latency_seconds=SLOW_SECONDS)
        dagster.drop("a.jsonl", make_input(REQUESTS))
        batch_id = dagster.wait_for_batch("a")

        first = wait_for_answering(dagster, batch_id)
        wait_for_outcomes(dagster, batch_id, 10)
        dagster.kill_worker(first)
        after_first = durable_outcomes(dagster, batch_id)

        second = wait_for_answering(dagster, batch_id, but=first.run_id)
        wait_for_outcomes(dagster, batch_id, 45)
        dagster.kill_worker(second)
        after_second = durable_outcomes(dagster, batch_id)
        dagster.simulate(latency_seconds=0.1)

        dagster.wait_for_status(batch_id, "completed")
        assert 10 <= len(after_first) < 45 <= len(after_second) < REQUESTS
        assert_undisturbed(dagster, batch_id, REQUESTS, {**after_second, **after_first})
        runs = dagster.runs("answer_chunks", batch=batch_id)
        assert [run.status for run in runs] == ["SUCCESS", "FAILURE", "FAILURE"]
        assert runs[0].tags["dagster/retry_number"] == "2"
        chunks = dagster.partitions("chunk_results")
        assert len(chunks["materialized"]) == 3
        assert not chunks["failed"]
        assert_no_engine_is_left(dagster)


def assert_no_engine_is_left(dagster):
    records = dagster.folder.logs / "engines"
    wait_until(lambda: not list(records.glob("*.process.json")), 20, "no engine is on record")
