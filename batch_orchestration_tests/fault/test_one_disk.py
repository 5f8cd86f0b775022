"""Data folder, Dagster's storage and all logs on one disk, which fills up in mid-run."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from batch_orchestration.core.batches import chunk_key
from batch_orchestration.defs.run_worker import patient_events
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal import read_journal
from batch_orchestration_tests.fault.accidents import wait_for_answering
from batch_orchestration_tests.fault.disks import fill, small_disk
from batch_orchestration_tests.fault.processes import wait_until
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.dagster_processes import dagster_dev
from batch_orchestration_tests.support.deployment import Deployment

REQUESTS = 200
#: So that the disk is full before half of them are answered.
LATENCY = '{"latency_seconds": 0.5}'
FULL_SECONDS = 6.0
SETTINGS = {
    "BATCH_REQUESTS_PER_CHUNK": "20",
    "BATCH_IN_FLIGHT": "8",
    "BATCH_DISK_RESERVE_BYTES": "0",
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", mebibytes=48) as place:
        yield place


def journaled(folder: DataFolder, batch_id: str) -> int:
    journals = (folder.journals / batch_id).glob("*.journal")
    return sum(1 for path in journals for _ in read_journal(path))


def no_room_for_a_while(disk: Path, folder: DataFolder, batch_id: str, after: int) -> None:
    """Fill the disk once so many requests are answered; make room again some seconds later."""
    wait_until(lambda: journaled(folder, batch_id) >= after, 60)
    ballast = fill(disk, but=0)
    time.sleep(FULL_SECONDS)
    ballast.unlink()


def engine_starts(folder: DataFolder) -> int:
    return len(list((folder.logs / "engines").glob("*.log")))


@contextlib.contextmanager
def deployment_on(disk: Path) -> Iterator[Deployment]:
    """Runs within this process, with an instance whose storage is on the disk."""
    deployment = Deployment(disk, requests_per_chunk=20, in_flight=8, disk_reserve_bytes=0)
    deployment.close()
    (disk / "dagster").mkdir()
    overrides = {"python_logs": {"managed_python_loggers": ["batch_orchestration"]}}
    with dg.instance_for_test(temp_dir=str(disk / "dagster"), overrides=overrides) as instance:
        deployment.instance = instance
        yield deployment


def test_a_run_whose_whole_instance_is_on_a_full_disk_goes_on_by_itself(disk: Path) -> None:
    with deployment_on(disk) as deployment:
        (deployment.folder.root / "simulated.json").write_text(LATENCY)
        batch_id = deployment.admit("a.jsonl", make_input(REQUESTS))
        (request,) = deployment.requests("dispatch_sensor")
        trouble = threading.Thread(
            target=no_room_for_a_while, args=(disk, deployment.folder, batch_id, 40)
        )
        trouble.start()
        with patient_events():
            result = deployment.run(request)
        trouble.join()

        assert result.success
        settled = list(deployment.store.settled(batch_id))
        assert [each.index for each in settled] == list(range(REQUESTS))
        assert {each.attempts for each in settled} == {1}
        assert engine_starts(deployment.folder) == 1
        keys = {chunk_key(batch_id, number) for number in range(REQUESTS // 20)}
        assert keys <= deployment.statuses("chunk_results")


@pytest.mark.slow
def test_a_worker_whose_whole_instance_is_on_a_full_disk_goes_on_by_itself(disk: Path) -> None:
    """Dagster's daemon may end for it; whoever starts it again finds the worker at work."""
    with dagster_dev(disk, **SETTINGS) as dagster:
        dagster.simulate(latency_seconds=0.5)
        dagster.drop("a.jsonl", make_input(REQUESTS))
        batch_id = dagster.wait_for_batch("a")
        run = wait_for_answering(dagster, batch_id)
        no_room_for_a_while(disk, dagster.folder, batch_id, 40)
        if not dagster.is_up():
            dagster.start()
        dagster.wait_for_status(batch_id, "completed")
        runs = dagster.runs("answer_chunks", batch=batch_id)
        chunks = dagster.partitions("chunk_results")
        settled = list(dagster.store.settled(batch_id))

    assert [each.index for each in settled] == list(range(REQUESTS))
    assert {(each.provenance.run_id, each.attempts) for each in settled} == {(run.run_id, 1)}
    assert [(each.run_id, each.status) for each in runs] == [(run.run_id, "SUCCESS")]
    assert len(chunks["materialized"]) == REQUESTS // 20
