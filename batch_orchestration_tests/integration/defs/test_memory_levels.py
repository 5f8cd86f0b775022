"""Dagster shows on which level of the memory fallback a chunk was completed."""

import json

import dagster as dg
import pytest

from batch_orchestration.defs.partitions import BATCH_TAG, range_tags
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.deployment import materializations


@pytest.fixture
def deployment(deploy):
    return deploy(in_flight=32)


def levels_shown(deployment, name: str, requests: int) -> set[str]:
    """Run a batch; return the levels in the metadata of its chunks."""
    batch_id = deployment.admit(name, make_input(requests))
    numbers = range(-(-requests // 5))
    result = deployment.run(
        dg.RunRequest(
            job_name="answer_chunks", tags={BATCH_TAG: batch_id, **range_tags(batch_id, numbers)}
        )
    )
    assert result.success
    return {metadata["memory_level"] for metadata in materializations(result).values()}


def test_the_level_is_shown_and_the_next_run_begins_on_it(deployment) -> None:
    conditions = deployment.folder.root / "simulated.json"
    conditions.write_text(json.dumps({"latency_seconds": 0.05, "dies_above": 12}))

    assert levels_shown(deployment, "first.jsonl", 40) == {"max-num-seqs 8"}

    conditions.unlink()
    assert levels_shown(deployment, "second.jsonl", 41) == {"max-num-seqs 8"}
    [(engine, descent)] = json.loads(deployment.folder.memory_levels.read_text()).items()
    assert engine.startswith("simulated on simulated")
    assert descent["levels"] == [{"max_num_seqs": 16}, {"max_num_seqs": 8}]


def test_an_engine_with_enough_memory_runs_as_configured(deployment) -> None:
    assert levels_shown(deployment, "first.jsonl", 20) == {"as configured"}
    assert not deployment.folder.memory_levels.exists()
