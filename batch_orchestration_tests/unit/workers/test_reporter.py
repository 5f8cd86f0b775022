"""The heartbeats of a worker: written, on a full disk, and removed afterwards."""

import os
import signal
import threading
import time

import msgspec
import pytest
from filelock import FileLock

from batch_orchestration.engines.processes.records import identify, is_running
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.workers import heartbeat_files
from batch_orchestration.workers.cleanup import (
    WORKER_TAG,
    clear_after_crashes,
    end_worker,
    living_workers,
    recorded_worker,
    worker_of,
)
from batch_orchestration.workers.heartbeat import Heartbeat
from batch_orchestration.workers.heartbeat_files import read_last_heartbeat, write_heartbeat
from batch_orchestration.workers.reporter import (
    heartbeats_written,
    holding,
    report_phase,
    status_of_this_worker,
)
from batch_orchestration_tests.support.children import child, next_line

EVERY = 0.02


@pytest.fixture
def folder(tmp_path):
    folder = DataFolder(tmp_path)
    folder.create()
    return folder


def beats_of(folder, *, every_seconds=EVERY):
    return heartbeats_written(
        folder=folder, run_id="run", job="answer_chunks", every_seconds=every_seconds
    )


def wait_for_heartbeat(folder, condition=lambda last: last.current is not None):
    deadline = time.monotonic() + 5
    while (last := read_last_heartbeat(folder.heartbeat_path("run"))) is None or not condition(
        last
    ):
        assert time.monotonic() < deadline, last
        time.sleep(EVERY)
    return last


def test_a_heartbeat_says_who_works_at_what_and_is_gone_at_a_clean_end(folder):
    with beats_of(folder) as status:
        status.enter("feeding", patience_seconds=160.0)
        status.begin_chunk("candidates-1", 7)
        status.in_flight = 12
        beat = wait_for_heartbeat(folder, lambda last: last.heartbeat.in_flight == 12).current

        assert worker_of(beat) == identify(os.getpid())
        assert (beat.run_id, beat.job, beat.phase) == ("run", "answer_chunks", "feeding")
        assert (beat.batch_id, beat.chunk, beat.patience_seconds) == ("candidates-1", 7, 160.0)
        assert living_workers(folder) == {"run": identify(os.getpid())}

    assert list(folder.heartbeats.iterdir()) == []
    assert status_of_this_worker() is None


def test_work_that_is_no_answering_says_what_it_is_and_has_minutes_for_each_sign(folder):
    report_phase("delivering", "a batch")  # no worker: nothing happens

    with beats_of(folder) as status:
        report_phase("delivering", "candidates-1")

        assert (status.phase, status.patience_seconds) == ("delivering", 660.0)
        assert status is status_of_this_worker()


def test_waiting_for_a_lock_is_no_standstill(folder, monkeypatch):
    """Whoever has it is watched, too; whoever waits has done nothing to be ended for."""
    monkeypatch.setattr("batch_orchestration.workers.reporter.LOCK_SECONDS", 0.05)
    path = folder.root / "some.lock"
    waited = threading.Event()

    def wait() -> None:
        with holding(FileLock(path)):
            waited.set()

    with beats_of(folder) as status, FileLock(path) as lock:
        began = status.progress_at
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.3)
        assert status.progress_at > began
        assert not waited.is_set()
        lock.release()
        waiting.join(10)

    assert waited.is_set()


def refuse(*_):
    raise OSError(28, "No space left on device")


def test_a_heartbeat_tells_as_much_on_a_full_disk(folder, monkeypatch):
    """If it could only be heard there, a full disk would hide a worker that is stuck."""
    with beats_of(folder) as status:
        first = wait_for_heartbeat(folder)
        monkeypatch.setattr(heartbeat_files.Path, "write_bytes", refuse)
        status.in_flight = 12

        beat = wait_for_heartbeat(
            folder,
            lambda last: last.current and last.current.in_flight == 12,
        )
        assert beat.at > first.at


def test_a_heartbeat_that_cannot_be_overwritten_either_is_heard_all_the_same(folder, monkeypatch):
    """Judged by an old file it would be stuck; judged by none, silent."""
    path = folder.heartbeat_path("run")
    with beats_of(folder):
        first = wait_for_heartbeat(folder)
        with monkeypatch.context() as full:
            full.setattr("batch_orchestration.workers.reporter.write_heartbeat", refuse)

            heard = wait_for_heartbeat(folder, lambda last: last.current is None)
            assert heard.at > first.at
            assert worker_of(heard.heartbeat) == identify(os.getpid())
            path.unlink()
            assert wait_for_heartbeat(folder, lambda last: last.at > first.at).heartbeat is None
        wait_for_heartbeat(folder)

    assert list(folder.heartbeats.iterdir()) == []


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_what_a_heartbeat_tells_does_not_depend_on_the_clock_of_a_file_server(folder, ahead):
    path = folder.heartbeat_path("run")
    with beats_of(folder, every_seconds=60.0):
        os.utime(path, (time.time() + ahead, time.time() + ahead))

        last_heartbeat = read_last_heartbeat(path)

    assert last_heartbeat.current is not None
    assert last_heartbeat.at == last_heartbeat.current.at


def test_no_error_ends_the_heartbeats(folder, monkeypatch, caplog):
    """A healthy worker would be killed as silent a minute later."""
    with beats_of(folder) as status:
        status.enter("feeding", patience_seconds=float("inf"))
        beat = wait_for_heartbeat(
            folder,
            lambda last: last.current and last.current.phase == "feeding",
        )
        assert beat.current.patience_seconds > 1e8
        status.patience_seconds = float("inf")  # As the hang watch does, once per sign of progress.
        status.phase = "answering"
        beat = wait_for_heartbeat(
            folder, lambda last: last.current and last.current.phase == "answering"
        )
        assert beat.current.patience_seconds > 1e8

        with monkeypatch.context() as broken:
            broken.setattr(status, "phase", object())
            heard = wait_for_heartbeat(folder, lambda last: last.current is None)
            wait_for_heartbeat(folder, lambda last: last.at > heard.at)
        wait_for_heartbeat(folder)

    assert len(caplog.records) == 1


def test_a_heartbeat_that_cannot_be_written_at_all_stops_nothing(folder, monkeypatch, caplog):
    monkeypatch.setattr("batch_orchestration.workers.reporter.write_heartbeat", refuse)

    with beats_of(folder):
        time.sleep(5 * EVERY)

    assert len(caplog.records) == 1


def test_what_dead_workers_left_is_removed_and_what_living_ones_wrote_is_not(folder):
    me = identify(os.getpid())
    fields = {"job": "answer_chunks", "phase": "feeding", "patience_seconds": 1.0}

    def leave(run_id, process):
        beat = Heartbeat(
            run_id=run_id,
            at=time.time(),
            progress_at=time.time(),
            **fields,
            **msgspec.structs.asdict(process),
        )
        write_heartbeat(folder.heartbeat_path(run_id), beat)

    leave("mine", me)
    leave("of-another-boot", msgspec.structs.replace(me, boot_id="an-earlier-boot"))
    leave("of-a-pid-that-was-reused", msgspec.structs.replace(me, started=me.started - 1))
    write_heartbeat(folder.heartbeats / "unreadable.json", {"at": "?"})

    said = clear_after_crashes(folder)

    assert len(said) == 2
    left = sorted(path.stem for path in folder.heartbeats.glob("*.json"))
    assert left == ["mine", "unreadable"]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_worker_is_ended_though_it_is_stopped_and_tells_where_it_was(tmp_path, stopped):
    log = tmp_path / "log"
    program = """
        import faulthandler, sys, time
        from batch_orchestration.workers.cleanup import STACKS_SIGNAL
        log = open(sys.argv[1], "w")
        faulthandler.register(STACKS_SIGNAL, file=log)
        def hang():
            print("ready", flush=True)
            time.sleep(300)
        hang()
    """
    with child(program, log) as process:
        next_line(process)
        worker = identify(process.pid)
        if stopped:
            os.kill(process.pid, signal.SIGSTOP)

        end_worker(worker)

        assert not is_running(worker)
    assert ("in hang" in log.read_text()) is not stopped


def test_a_stranger_with_the_same_pid_is_not_ended():
    with child("print('ready', flush=True); import time; time.sleep(300)") as process:
        next_line(process)
        stranger = identify(process.pid)

        end_worker(msgspec.structs.replace(stranger, started=stranger.started - 1))
        end_worker(msgspec.structs.replace(stranger, boot_id="an-earlier-boot"))

        assert is_running(stranger)


def test_a_retry_does_not_take_its_parents_worker_for_its_own():
    tags = {WORKER_TAG: '{"pid": 1, "started": 1, "boot_id": "b", "run_id": "parent"}'}

    assert recorded_worker("parent", tags).pid == 1
    assert recorded_worker("retry", tags) is None
