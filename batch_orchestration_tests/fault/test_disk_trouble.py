"""A disk that is full or cannot be written: real file systems, which need the right to mount."""

import contextlib
import logging
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.admission.results import Admitted
from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import DiskFull, EngineDied, StorageError
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration_tests.fault.disks import fill, mount, small_disk
from batch_orchestration_tests.fault.mixed_batches import durable_outcomes
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench

REQUESTS = 300
#: Smaller than what the journals of the batch come to.
ROOM_BYTES = 64 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    with small_disk(tmp_path / "disk", mebibytes=24) as place:
        yield place


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    mount("--bind", folder, folder)
    try:
        mount("-o", "remount,ro,bind", folder)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def running(
    bench: Workbench, plan: BatchPlan, *, engine: ScriptedEngine | None = None, **policy: Any
) -> Iterator[Callable[[], None]]:
    """Run the batch in a thread; the block gets what waits for its end, and raises its error."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            bench.run(plan, engine or ScriptedEngine(), **policy)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    def wait() -> None:
        thread.join(60)
        assert not thread.is_alive()
        if errors:
            raise errors[0]

    thread = threading.Thread(target=work)
    thread.start()
    yield wait
    thread.join(60)


def wait_for(caplog: pytest.LogCaptureFixture, words: str) -> str:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for record in caplog.records:
            if words in record.getMessage():
                return record.getMessage()
        time.sleep(0.05)
    raise AssertionError(f"nobody said {words!r}: {[r.getMessage() for r in caplog.records]}")


def test_journaling_pauses_on_a_full_disk_and_goes_on_when_there_is_room(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    bench = Workbench(disk / "data")
    plan = bench.admitted(REQUESTS, requests_per_chunk=100)
    ballast = fill(disk, but=ROOM_BYTES)

    with running(bench, plan) as wait:
        message = wait_for(caplog, "paused until the disk has space")
        before = durable_outcomes(bench.folder, plan)
        time.sleep(2.5)
        while_full = durable_outcomes(bench.folder, plan)
        ballast.unlink()
        wait()

    assert "nothing is lost" in message
    assert ".journal" in message
    assert 0 < len(before) < REQUESTS
    assert while_full == before
    after = durable_outcomes(bench.folder, plan)
    assert {index: after[index] for index in before} == before
    assert bench.indices(plan) == list(range(REQUESTS))
    assert bench.store.failures(plan.batch_id) == []


def test_a_chunk_that_begins_on_a_full_disk_waits_for_room(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even the line that begins its journal can be written."""
    caplog.set_level(logging.WARNING)
    bench = Workbench(disk / "data")
    plan = bench.admitted(REQUESTS, requests_per_chunk=100)
    ballast = fill(disk, but=0)

    with running(bench, plan) as wait:
        wait_for(caplog, "paused until the disk has space")
        while_full = durable_outcomes(bench.folder, plan)
        ballast.unlink()
        wait()

    assert while_full == {}
    assert bench.indices(plan) == list(range(REQUESTS))


def test_an_engine_that_dies_while_the_disk_is_full_leaves_its_suspects_to_be_found(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    bench = Workbench(disk / "data")
    plan = bench.admitted(REQUESTS, requests_per_chunk=100)
    ballast = disk / "ballast"

    def script(body: bytes, submitted: int) -> EngineDied | None:
        if b"question 150" not in body:
            return None
        if not submitted:
            fill(disk, but=0)
        return EngineDied("scripted")

    with running(bench, plan, engine=ScriptedEngine(script), engine_restarts=20) as wait:
        wait_for(caplog, "paused until the disk has space")
        ballast.unlink()
        wait()

    assert bench.indices(plan) == list(range(REQUESTS))
    (failed,) = bench.store.failures(plan.batch_id)
    assert failed.index == 150
    assert isinstance(failed.outcome, Failure)
    assert failed.outcome.code is FailureCode.ENGINE_KILLED


def test_commits_wait_for_room_while_answers_go_on_into_the_journals(
    disk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The store's disk is full, that of the journals is not."""
    caplog.set_level(logging.WARNING)
    bench = Workbench(disk / "data")
    bench.folder.journals.rmdir()
    (tmp_path / "journals").mkdir()
    bench.folder.journals.symlink_to(tmp_path / "journals")
    plan = bench.admitted(REQUESTS, requests_per_chunk=100)
    ballast = fill(disk, but=0)

    with running(bench, plan) as wait:
        message = wait_for(caplog, f"commits of batch {plan.batch_id} wait")
        wait_until(lambda: len(durable_outcomes(bench.folder, plan)) == REQUESTS)
        ballast.unlink()
        wait()

    assert "the answers are in the journals" in message
    assert bench.indices(plan) == list(range(REQUESTS))
    assert bench.store.batch(plan.batch_id).chunks_committed == 3


def test_wherever_admission_meets_a_full_disk_it_says_so_and_the_file_is_admitted_once(
    disk: Path,
) -> None:
    """With so many pages more at each attempt that it fails at one place after the other."""
    bench = Workbench(disk / "data")
    claim = bench.claim("a.jsonl", make_input(50), meta=b'{"priority": 2}')
    failures = 0
    for pages in (*range(8), *range(8, 64, 8), 128, 256, 512):
        ballast = fill(disk, but=4096 * pages)
        try:
            verdict = bench.admit(claim)
        except DiskFull:
            failures += 1
        else:
            break
        finally:
            ballast.unlink()

    assert failures > 2
    assert isinstance(verdict, Admitted)
    assert bench.folder.batch_ids() == [verdict.batch_id]
    assert bench.store.batch(verdict.batch_id).total == 50
    assert bench.folder.read_plan(verdict.batch_id).options.priority == 2
    assert bench.inbox.claims() == []


@pytest.mark.parametrize("place", ["journals", "."])
def test_a_disk_that_turns_read_only_ends_the_run_with_the_path_and_loses_nothing(
    disk: Path, place: str
) -> None:
    bench = Workbench(disk / "data")
    plan = bench.admitted(REQUESTS, requests_per_chunk=100)
    bench.run(plan, ScriptedEngine(), numbers=[0])

    with (
        read_only(bench.folder.root / place),
        pytest.raises(StorageError, match=r"data/\S+: Read-only file system"),
    ):
        bench.run(plan, ScriptedEngine(), run_id="run-2")

    bench.run(plan, ScriptedEngine(), run_id="run-3")
    assert bench.indices(plan) == list(range(REQUESTS))
    runs = {settled.provenance.run_id for settled in bench.store.settled(plan.batch_id)}
    assert runs == {"run-1", "run-3"}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
