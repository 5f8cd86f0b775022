"""A backup as `docs/operations.md` tells to make it: of a deployment at work, restored."""

import shutil

from batch_orchestration_tests.builders import make_input
from batch_orchestration_tests.fault.accidents import (
    SLOW_SECONDS,
    assert_undisturbed,
    durable_outcomes,
    wait_for_answering,
    wait_for_outcomes,
)
from batch_orchestration_tests.integration.dagster_processes import dagster_dev

REQUESTS = 60
LEFT_OUT = shutil.ignore_patterns("*.duckdb*", "simulated.json")


def test_a_backup_made_while_a_batch_is_answered_is_enough_to_finish_it(tmp_path):
    with dagster_dev(tmp_path, BATCH_REQUESTS_PER_CHUNK="20", BATCH_IN_FLIGHT="4") as dagster:
        data, backup = dagster.folder.root, tmp_path / "backup"
        dagster.simulate(latency_seconds=SLOW_SECONDS)
        dagster.drop("a.jsonl", make_input(REQUESTS))
        batch_id = dagster.wait_for_batch("a")
        wait_for_answering(dagster, batch_id)
        wait_for_outcomes(dagster, batch_id, 25)
        before = durable_outcomes(dagster, batch_id)

        shutil.copytree(data, backup, ignore=LEFT_OUT)
        dagster.kill_everything()
        shutil.rmtree(data)
        shutil.copytree(backup, data)
        said = dagster.command("recover")
        dagster.simulate(latency_seconds=0.1)
        dagster.start()

        dagster.wait_for_status(batch_id, "completed")
        assert f"{batch_id}: in_progress" in said
        assert 25 <= len(before) < REQUESTS
        assert_undisturbed(dagster, batch_id, REQUESTS, before)
