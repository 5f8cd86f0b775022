"""Dagster's share of housekeeping: what is gone harms neither dispatch nor a batch that goes on."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.defs.housekeeping import partition_schedule
from batch_orchestration.defs.housekeeping_in_dagster import dagster_parts
from batch_orchestration.defs.partitions import BATCH_TAG
from batch_orchestration.lifecycle.resumption import resume
from batch_orchestration.operations.housekeeping.clean import (
    Cleanup,
    CleanupReport,
    results_file,
    run_cleanup,
)
from batch_orchestration_tests.support.builders import make_input, make_line
from batch_orchestration_tests.support.deployment import Deployment

DAY = 86_400.0


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    """With an instance on the disk, where runs have files."""
    deployment = Deployment(tmp_path)
    deployment.instance.dispose()
    (tmp_path / "dagster").mkdir()
    deployment.instance = dg.DagsterInstance.local_temp(str(tmp_path / "dagster"))
    yield deployment
    deployment.close()


def clean(deployment: Deployment, *parts: str, days: float = 100, **settings: Any) -> CleanupReport:
    """Clean up, as if so many days had gone by."""
    in_force = deployment.settings.model_copy(update=settings)
    house = Cleanup(deployment.folder, deployment.store, now=time.time() + days * DAY)
    report = run_cleanup(
        [p for p in dagster_parts(deployment.instance, in_force) if p.name in parts],
        house,
        clock=time.monotonic,
    )
    assert [result.problem for result in report.results] == [None] * len(parts)
    return report


def keys(deployment: Deployment, batch_id: str) -> list[str]:
    """All keys of a batch in both key spaces, in the order that ranges go by."""
    found = [
        *deployment.instance.get_dynamic_partitions("batches"),
        *deployment.instance.get_dynamic_partitions("chunks"),
    ]
    return [key for key in found if key.startswith(batch_id)]


def runs(deployment: Deployment, batch_id: str) -> list[str]:
    return [
        run.run_id
        for run in deployment.instance.get_runs(dg.RunsFilter(tags={BATCH_TAG: batch_id}))
    ]


def files(deployment: Deployment, run_id: str) -> list[Path]:
    """What a run left on the disk; Dagster's own logs of its steps included."""
    root = deployment.folder.root.parent / "dagster"
    return [path for path in root.rglob("*") if path.is_file() and run_id in str(path)]


def work_off(deployment: Deployment, batch_id: str) -> None:
    deployment.work_off()
    assert deployment.store.batch(batch_id).status is BatchStatus.COMPLETED


def test_a_delivered_batch_leaves_dagster_and_an_unfinished_one_keeps_everything(
    deployment: Deployment,
) -> None:
    old = deployment.admit("old.jsonl", make_input(7))
    work_off(deployment, old)
    at_work = deployment.admit("at_work.jsonl", make_input(12))
    (wanted,) = deployment.requests("dispatch_sensor")
    old_runs, present_keys = runs(deployment, old), keys(deployment, at_work)
    assert old_runs
    assert all(files(deployment, run_id) for run_id in old_runs)

    early = clean(deployment, "partitions", "runs", days=80)
    late = clean(deployment, "partitions", "runs", days=100)

    assert early.removals == {}
    assert {removal.subject for removal in late.removals["runs"]} >= set(old_runs)
    assert all(removal.size_bytes > 0 for removal in late.removals["runs"])
    assert (keys(deployment, old), runs(deployment, old)) == ([], [])
    assert not any(files(deployment, run_id) for run_id in old_runs)
    assert keys(deployment, at_work) == present_keys
    assert runs(deployment, at_work), "its admission"
    assert [r.run_key for r in deployment.requests("dispatch_sensor")] == [wanted.run_key]
    work_off(deployment, at_work)


def test_a_cancelled_batch_that_is_resumed_has_its_partitions_again(deployment: Deployment) -> None:
    batch_id = deployment.admit("cut.jsonl", make_input(12))
    deployment.cancel(batch_id)
    (last,) = deployment.requests("dispatch_sensor")
    assert deployment.run(last).success
    before = keys(deployment, batch_id)

    clean(deployment, "partitions", "runs")
    assert (keys(deployment, batch_id), runs(deployment, batch_id)) == ([], [])
    resume(
        batch_id,
        folder=deployment.folder,
        store=deployment.store,
        actor="me",
        at=time.time(),
    )
    work_off(deployment, batch_id)

    assert keys(deployment, batch_id) == before
    assert deployment.statuses("batch_output") >= {batch_id}


def test_above_the_bound_the_first_that_was_delivered_goes_whatever_its_age(
    deployment: Deployment,
) -> None:
    first = deployment.admit("first.jsonl", make_input(12))
    work_off(deployment, first)
    second = deployment.admit("second.jsonl", make_line(99))
    unfinished = deployment.admit("unfinished.jsonl", make_input(7))
    assert schedule(deployment, max_chunk_partitions=5)

    clean(deployment, "partitions", days=0.1, partition_retention_days=0, max_chunk_partitions=5)

    assert keys(deployment, first) == []
    assert len(keys(deployment, second)) == 2
    assert len(keys(deployment, unfinished)) == 3
    assert not schedule(deployment, max_chunk_partitions=5)
    assert not schedule(deployment, max_chunk_partitions=0)


def schedule(deployment: Deployment, **settings: Any) -> bool:
    """Whether the hourly look at the key space asks for a run."""
    context = dg.build_schedule_context(
        instance=deployment.instance,
        resources={"settings": deployment.settings.model_copy(update=settings)},
    )
    return isinstance(partition_schedule(context), dg.RunRequest)


def test_the_job_tells_what_it_did_and_what_it_would_do(deployment: Deployment) -> None:
    """Launched by hand, as the schedule launches it."""
    log = deployment.folder.logs / "runs" / "old.log"
    log.parent.mkdir()
    log.touch()

    assert deployment.launch("housekeeping", dry_run=True, parts=["logs"]).success
    assert not results_file(deployment.folder).path.exists()
    assert deployment.launch("housekeeping").success

    told = json.loads(results_file(deployment.folder).path.read_bytes())
    assert {"journals", "samples", "logs", "partitions", "runs", "ticks"} <= told.keys()
    assert all(result.get("problem") is None for result in told.values())


def test_an_unknown_part_is_refused(deployment: Deployment) -> None:
    assert not deployment.launch("housekeeping", parts=["everything"]).success
