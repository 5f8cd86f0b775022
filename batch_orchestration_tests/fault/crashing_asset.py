"""Materializes the chunks of a batch in a Dagster instance that lasts; see `crashing_batch`."""

import json
from pathlib import Path

import dagster as dg

from batch_orchestration.defs.partitions import BATCH_TAG, range_tags
from batch_orchestration_tests.fault.crashing_batch import kill_the_engine_instead
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.deployment import Deployment

REQUESTS, PER_CHUNK = 60, 10


def lasting_deployment(root: Path) -> Deployment:
    """A deployment whose instance outlives this process."""
    deployment = Deployment(root, requests_per_chunk=PER_CHUNK, in_flight=8)
    (root / "dagster").mkdir(exist_ok=True)
    deployment.instance = dg.DagsterInstance.local_temp(str(root / "dagster"))
    (deployment.folder.root / "simulated.json").write_text(json.dumps({"latency_seconds": 0.02}))
    return deployment


def materialize(root: Path, victim: str) -> None:
    deployment = lasting_deployment(root)
    if victim == "engine":
        kill_the_engine_instead(deployment.folder)
    batch_ids = deployment.folder.batch_ids() or [deployment.admit("a.jsonl", make_input(REQUESTS))]
    numbers = range(REQUESTS // PER_CHUNK)
    tags = {BATCH_TAG: batch_ids[0], **range_tags(batch_ids[0], numbers)}
    assert deployment.run(dg.RunRequest(job_name="answer_chunks", tags=tags)).success
