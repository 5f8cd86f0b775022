"""`kill -9` of what Dagster consists of: a run worker, the daemon, and all at once as a power cut.

One deployment for all: a start costs twenty seconds of two cores.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from batch_orchestration.engines.processes.records import (
    ProcessIdentity,
    ProcessRecord,
    identify,
    is_running,
    write_record,
)
from batch_orchestration.workers.cleanup import WORKER_TAG, RecordedWorker
from batch_orchestration.workers.heartbeat_files import read_last_heartbeat, write_heartbeat
from batch_orchestration_tests.fault.accidents import (
    SLOW_SECONDS,
    assert_undisturbed,
    durable_outcomes,
    wait_for_answering,
    wait_for_outcomes,
)
from batch_orchestration_tests.fault.processes import FAMILY
from batch_orchestration_tests.support.builders import make_body, make_input, make_line
from batch_orchestration_tests.support.dagster_client import Run
from batch_orchestration_tests.support.dagster_processes import (
    DagsterProcesses,
    dagster_dev,
    wait_until,
)

pytestmark = pytest.mark.slow

REQUESTS, PER_CHUNK, CHUNKS = 60, 10, 6
#: The store is made anew, and the accident is over.
LEFT_OUT = shutil.ignore_patterns("*.duckdb*", "simulated.json")


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    root = tmp_path_factory.mktemp("deployment")
    settings = {"BATCH_REQUESTS_PER_CHUNK": str(PER_CHUNK), "BATCH_IN_FLIGHT": "4"}
    with dagster_dev(root, **settings) as processes:
        yield processes


@pytest.fixture
def dagster(deployment):
    """Running, whatever an earlier test has left of it; its engines are slow."""
    if not deployment.is_up():
        deployment.start()
    deployment.simulate(latency_seconds=SLOW_SECONDS)
    return deployment


def answering(dagster: DagsterProcesses, name: str) -> tuple[str, Run]:
    """A batch that is being answered, and its run."""
    # The same content would be the same batch.
    lines = [make_line(n, body=make_body(f"{name} {n}")) for n in range(REQUESTS)]
    dagster.drop(f"{name}.jsonl", b"".join(lines))
    batch_id = dagster.wait_for_batch(name)
    return batch_id, wait_for_answering(dagster, batch_id)


def run_statuses(dagster: DagsterProcesses, batch_id: str) -> list[str]:
    """How its runs ended, the newest first."""
    return [run.status for run in dagster.runs("answer_chunks", batch=batch_id)]


def test_a_killed_run_worker_costs_no_answer_and_needs_nobody(dagster):
    """Killed twice: the second time the retry's first chunk comes from the store."""
    batch_id, first = answering(dagster, "worker")
    wait_for_outcomes(dagster, batch_id, 5)
    dagster.kill_worker(first)
    after_first = durable_outcomes(dagster, batch_id)

    second = wait_for_answering(dagster, batch_id, but=first.run_id)
    wait_for_outcomes(dagster, batch_id, max(PER_CHUNK, len(after_first)) + 5)
    dagster.kill_worker(second)
    after_second = durable_outcomes(dagster, batch_id)
    dagster.simulate(latency_seconds=0.1)

    dagster.wait_for_status(batch_id, "completed")
    assert 5 <= len(after_first) < len(after_second) < REQUESTS
    assert_undisturbed(dagster, batch_id, REQUESTS, {**after_second, **after_first})
    # By Dagster's retries. A daemon that has just started may not see the first failure; then
    # dispatch takes over after five minutes.
    assert run_statuses(dagster, batch_id) == ["SUCCESS", "FAILURE", "FAILURE"]
    chunks = dagster.partitions("chunk_results")
    assert len([key for key in chunks["materialized"] if key.startswith(batch_id)]) == CHUNKS
    assert not chunks["failed"]
    records = dagster.folder.logs / "engines"
    wait_until(lambda: not list(records.glob("*.process.json")), 20, "no engine is on record")


def test_a_run_goes_on_and_claimed_files_are_admitted_once_though_dagster_is_gone(dagster):
    """`dagster dev` gives up when its daemon dies; the run worker does not notice.

    Of files that are claimed nobody knows how far their runs were asked for.
    """
    batch_id, run = answering(dagster, "daemon")
    wait_for_outcomes(dagster, batch_id, 5)
    sizes = {f"file-{number}": 5 + number for number in range(2)}
    for name, requests in sizes.items():
        dagster.drop(f"{name}.jsonl", make_input(requests))
    claims = dagster.folder.claims
    wait_until(lambda: len(list(claims.glob("file-*/*.jsonl"))) == 2, 60, "all are claimed")

    dagster.kill_daemon()
    before = durable_outcomes(dagster, batch_id)
    dagster.simulate(latency_seconds=0.1)
    wait_until(lambda: not dagster.is_up(), 60, "dagster dev is gone")
    wait_until(lambda: len(dagster.store.chunk_reports(batch_id)) == CHUNKS, 60, "all is committed")
    dagster.start()

    dagster.wait_for_status(batch_id, "completed")
    assert len(before) < REQUESTS
    assert_undisturbed(dagster, batch_id, REQUESTS, before)
    (alone,) = dagster.runs("answer_chunks", batch=batch_id)
    assert (alone.run_id, alone.status) == (run.run_id, "SUCCESS")
    for name in sizes:
        dagster.wait_for_status(dagster.wait_for_batch(name), "completed")
    admitted = [b for b in dagster.store.batches() if b.file_name.startswith("file-")]
    assert sorted((b.file_name, b.total) for b in admitted) == [
        (f"{name}.jsonl", requests) for name, requests in sizes.items()
    ]
    assert not list(dagster.folder.inbox.glob("*.jsonl"))
    assert not list(claims.glob("file-*"))


def test_after_everything_was_killed_a_restart_finishes_the_batch(dagster):
    """As after a restart of the machine: the pids on record are strangers' now."""
    batch_id, lost = answering(dagster, "everything")
    heartbeat = dagster.folder.heartbeat_path(lost.run_id)
    wait_until(lambda: read_last_heartbeat(heartbeat) is not None, 60, "a heartbeat")
    wait_for_outcomes(dagster, batch_id, 15)
    engine = dagster.folder.engine_record_path(lost.run_id)

    dagster.kill_everything()
    before = durable_outcomes(dagster, batch_id)
    with strangers() as stranger:
        give_pids_away(dagster, lost.run_id, stranger)
        dagster.simulate(latency_seconds=0.1)
        dagster.start()

        dagster.wait_for_status(batch_id, "completed")
        assert is_running(stranger)
    assert 15 <= len(before) < REQUESTS
    assert_undisturbed(dagster, batch_id, REQUESTS, before)
    assert run_statuses(dagster, batch_id) == ["SUCCESS", "FAILURE"]
    assert not engine.exists()
    assert not heartbeat.exists()


@contextmanager
def strangers() -> Iterator[ProcessIdentity]:
    """Processes that are nothing to us; none is left afterwards."""
    with subprocess.Popen(FAMILY, start_new_session=True) as family:
        stranger = identify(family.pid)
        assert stranger is not None
        try:
            yield stranger
        finally:
            subprocess.run(["kill", "-9", "--", f"-{family.pid}"], check=True)


def give_pids_away(dagster: DagsterProcesses, run_id: str, stranger: ProcessIdentity) -> None:
    """Put on record that the worker and engine of a run had this pid, before the last boot."""
    earlier = msgspec.structs.replace(stranger, boot_id="an-earlier-boot")
    with dagster.instance() as instance:
        record = RecordedWorker(earlier.pid, earlier.started, earlier.boot_id, run_id)
        instance.add_run_tags(run_id, {WORKER_TAG: msgspec.json.encode(record).decode()})
    heartbeat = dagster.folder.heartbeat_path(run_id)
    last_heartbeat = read_last_heartbeat(heartbeat)
    assert last_heartbeat is not None
    who = msgspec.structs.asdict(earlier)
    write_heartbeat(heartbeat, msgspec.structs.replace(last_heartbeat.heartbeat, **who))
    write_record(
        dagster.folder.engine_record_path(run_id),
        ProcessRecord(leader=earlier, owner=earlier, members=(), command=("vllm",)),
    )


def test_a_backup_made_while_a_batch_is_answered_is_enough_to_finish_it(dagster, tmp_path):
    """As `docs/operations.md` tells to make it."""
    data, backup = dagster.folder.root, tmp_path / "backup"
    batch_id, _ = answering(dagster, "backup")
    wait_for_outcomes(dagster, batch_id, 15)
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
    assert 15 <= len(before) < REQUESTS
    assert_undisturbed(dagster, batch_id, REQUESTS, before)
