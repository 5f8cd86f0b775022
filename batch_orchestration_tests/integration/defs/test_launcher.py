"""The run launcher: detached workers that any process finds again, or knows to be gone."""

import os
import signal
from pathlib import Path

import dagster as dg
import msgspec
import pytest
import yaml
from dagster._core.definitions.reconstruct import ReconstructableJob
from dagster._core.launcher import WorkerStatus
from dagster._core.launcher.base import LaunchRunContext

from batch_orchestration.defs.launcher import LocalProcessRunLauncher
from batch_orchestration.engines.processes.records import ProcessIdentity, identify, is_running
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.workers.cleanup import WORKER_TAG, worker_of
from batch_orchestration.workers.heartbeat_files import read_last_heartbeat
from batch_orchestration_tests.support.dagster_processes import PATIENCE, kill, wait_until

START_SECONDS = 60
JOB_FILE = '''"""A job that waits for a file."""

import time
from pathlib import Path

import dagster as dg

print("said while loading")


@dg.op
def wait(context):
    while not Path(context.run.tags["until"]).exists():
        time.sleep(0.05)


@dg.job(executor_def=dg.in_process_executor)
def waiting():
    wait()
'''


class Bench:
    """An instance with the launcher, and one run of a job that waits for a file."""

    def __init__(self, root: Path) -> None:
        config = {
            "run_launcher": {
                "module": "batch_orchestration.defs.launcher",
                "class": "LocalProcessRunLauncher",
                "config": {"log_dir": str(root / "logs")},
            },
            "telemetry": {"enabled": False},
        }
        (root / "dagster.yaml").write_text(yaml.safe_dump(config))
        (root / "job.py").write_text(JOB_FILE)
        self.until = root / "go-on"
        self.root = root
        self.instance = dg.DagsterInstance.from_config(str(root))
        job = ReconstructableJob.for_file(str(root / "job.py"), "waiting")
        run = self.instance.create_run_for_job(
            job.get_definition(),
            tags={"until": str(self.until)},
            job_code_origin=job.get_python_origin(),
            status=dg.DagsterRunStatus.STARTING,
        )
        self.run_id = run.run_id

    @property
    def run(self) -> dg.DagsterRun:
        run = self.instance.get_run_by_id(self.run_id)
        assert run is not None
        return run

    @property
    def launcher(self) -> LocalProcessRunLauncher:
        launcher = self.instance.run_launcher
        assert isinstance(launcher, LocalProcessRunLauncher)
        return launcher

    @property
    def worker(self) -> ProcessIdentity:
        return msgspec.json.decode(self.run.tags[WORKER_TAG], type=ProcessIdentity)

    def launch(self) -> None:
        """Start the run and wait until its worker is at work."""
        self.launcher.launch_run(LaunchRunContext(self.run, workspace=None))
        self.wait_for(dg.DagsterRunStatus.STARTED)

    def wait_for(self, status: dg.DagsterRunStatus) -> None:
        wait_until(lambda: self.run.status is status, START_SECONDS, f"the run is {status}")

    @property
    def heartbeat(self) -> Path:
        return DataFolder(self.root / "data").heartbeat_path(self.run_id)

    def kill_worker(self) -> None:
        kill(self.worker)
        wait_until(lambda: not is_running(self.worker), 10, "the worker is gone")

    def seen(self) -> WorkerStatus:
        return self.launcher.check_run_worker_health(self.run).status

    def is_reaped(self) -> bool:
        self.launcher.check_run_worker_health(self.run)
        return not Path(f"/proc/{self.worker.pid}").exists()

    def health_seen_by_another_process(self) -> WorkerStatus:
        with dg.DagsterInstance.from_config(str(self.root)) as other:
            return other.run_launcher.check_run_worker_health(self.run).status


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("BATCH_HEARTBEAT_SECONDS", "0.1")
    monkeypatch.setenv("BATCH_SILENT_SECONDS", "1")
    bench = Bench(tmp_path)
    yield bench
    if bench.run.tags.get(WORKER_TAG) and bench.worker.pid != os.getpid():
        kill(bench.worker)
        wait_until(lambda: not is_running(bench.worker), 10, "the worker is gone")
        wait_until(bench.is_reaped, 10, "the worker is reaped")
    bench.instance.dispose()


def test_a_worker_is_detached_recorded_and_runs_to_the_end(bench):
    bench.launch()

    assert os.getsid(bench.worker.pid) == bench.worker.pid
    assert bench.seen() is WorkerStatus.RUNNING
    assert bench.health_seen_by_another_process() is WorkerStatus.RUNNING
    beat = read_last_heartbeat(bench.heartbeat).current
    assert (beat.run_id, beat.job) == (bench.run_id, "waiting")
    assert worker_of(beat) == bench.worker
    bench.until.touch()
    bench.wait_for(dg.DagsterRunStatus.SUCCESS)
    wait_until(lambda: not bench.heartbeat.exists(), 20, "the heartbeat is gone")


def test_a_zombie_that_nobody_reaps_is_no_worker(bench):
    """Its parent, this process, does not reap; that another one looks changes nothing."""
    bench.launch()
    stat = Path(f"/proc/{bench.worker.pid}/stat")

    kill(bench.worker)

    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", 10, "it is a zombie")
    assert bench.health_seen_by_another_process() is WorkerStatus.FAILED
    assert stat.exists()


def test_a_killed_worker_is_known_to_be_gone_with_its_last_words_and_is_reaped(bench):
    bench.launch()

    bench.kill_worker()

    assert bench.seen() is WorkerStatus.FAILED
    assert "said while loading" in (bench.launcher.get_run_worker_debug_info(bench.run) or "")
    # Its threads may take a moment longer to end than it does.
    wait_until(bench.is_reaped, 10, "it is reaped")
    assert bench.launcher.terminate(bench.run_id)
    assert bench.run.status is dg.DagsterRunStatus.CANCELED


def test_a_worker_that_is_stopped_is_killed_and_said_to_have_failed(bench):
    """Not canceled: that would mean that a person wants its batch to end."""
    bench.launch()
    os.kill(bench.worker.pid, signal.SIGSTOP)

    def found() -> bool:
        return bench.seen() is WorkerStatus.FAILED

    wait_until(found, 20, "it is found")
    assert not is_running(bench.worker)
    assert bench.run.status is dg.DagsterRunStatus.STARTED
    assert not list((bench.root / "data/heartbeats").iterdir())


def test_a_worker_without_any_heartbeat_is_left_alone_while_it_starts(bench):
    bench.launch()
    os.kill(bench.worker.pid, signal.SIGSTOP)
    bench.heartbeat.unlink()

    looks = [bench.seen() for _ in range(20)]

    assert set(looks) == {WorkerStatus.RUNNING}


def test_a_worker_of_a_version_without_heartbeats_is_never_judged_by_them(bench):
    bench.launch()
    old = msgspec.json.encode(bench.worker).decode()
    bench.instance.add_run_tags(bench.run_id, {WORKER_TAG: old})
    os.kill(bench.worker.pid, signal.SIGSTOP)

    def found() -> bool:
        return bench.seen() is WorkerStatus.FAILED

    with pytest.raises(AssertionError, match="it is found"):
        wait_until(found, 3 / PATIENCE, "it is found")


@pytest.mark.parametrize("field", ["boot_id", "started"])
def test_another_process_with_the_same_pid_is_not_the_worker(bench, field):
    me = identify(os.getpid())
    other = {"boot_id": "an-earlier-boot"} if field == "boot_id" else {"started": me.started - 1}
    stranger = msgspec.structs.replace(me, **other)
    bench.instance.add_run_tags(bench.run_id, {WORKER_TAG: msgspec.json.encode(stranger).decode()})

    assert bench.seen() is WorkerStatus.FAILED


def test_a_run_without_a_recorded_worker_is_not_healthy(bench):
    assert bench.seen() is WorkerStatus.NOT_FOUND


def test_a_worker_that_was_not_recorded_any_more_is_known_by_its_heartbeat(bench):
    """The daemon died in between. Started twice, two would want the same device."""
    bench.launch()
    worker = bench.worker
    bench.instance.add_run_tags(bench.run_id, {WORKER_TAG: ""})

    assert bench.seen() is WorkerStatus.RUNNING
    kill(worker)
    wait_until(lambda: not is_running(worker), 10, "the worker is gone")

    assert bench.seen() is WorkerStatus.FAILED


def test_whether_a_worker_is_gone_needs_neither_settings_nor_heartbeats_that_can_be_read(
    bench, monkeypatch
):
    bench.launch()

    def refuse(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as daemon:
        daemon.setattr("batch_orchestration.defs.launcher.read_last_heartbeat", refuse)
        assert bench.seen() is WorkerStatus.RUNNING
    with monkeypatch.context() as daemon:
        daemon.setenv("BATCH_SILENT_SECONDS", "a minute")
        assert bench.seen() is WorkerStatus.RUNNING
        bench.kill_worker()
        assert bench.seen() is WorkerStatus.FAILED


def test_terminating_interrupts_the_worker_and_the_run_ends_as_canceled(bench):
    bench.launch()

    assert bench.launcher.terminate(bench.run_id)

    bench.wait_for(dg.DagsterRunStatus.CANCELED)
    wait_until(lambda: not is_running(bench.worker), 20, "the worker is gone")
    assert not bench.launcher.terminate(bench.run_id)
