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

from batch_orchestration.engines.process_records import ProcessIdentity, identify, is_running
from batch_orchestration.launcher import WORKER_TAG, LocalProcessRunLauncher
from batch_orchestration_tests.integration.dagster_processes import kill, wait_until

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
                "module": "batch_orchestration.launcher",
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

    def health_seen_by_another_process(self) -> WorkerStatus:
        with dg.DagsterInstance.from_config(str(self.root)) as other:
            return other.run_launcher.check_run_worker_health(self.run).status


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    if WORKER_TAG in bench.run.tags and bench.worker.pid != os.getpid():
        kill(bench.worker)
        wait_until(lambda: not is_running(bench.worker), 10, "the worker is gone")
    bench.launcher.check_run_worker_health(bench.run)  # reaps it
    bench.instance.dispose()


def test_a_worker_is_detached_recorded_and_runs_to_the_end(bench):
    bench.launch()

    assert os.getsid(bench.worker.pid) == bench.worker.pid
    assert bench.launcher.check_run_worker_health(bench.run).status is WorkerStatus.RUNNING
    assert bench.health_seen_by_another_process() is WorkerStatus.RUNNING
    bench.until.touch()
    bench.wait_for(dg.DagsterRunStatus.SUCCESS)


def test_a_killed_worker_is_known_to_be_gone_with_its_last_words(bench):
    bench.launch()

    kill(bench.worker)

    wait_until(lambda: not is_running(bench.worker), 10, "the worker is gone")
    assert bench.launcher.check_run_worker_health(bench.run).status is WorkerStatus.FAILED
    assert bench.health_seen_by_another_process() is WorkerStatus.FAILED
    assert "said while loading" in (bench.launcher.get_run_worker_debug_info(bench.run) or "")


def test_a_dead_worker_leaves_no_zombie(bench):
    bench.launch()
    pid = bench.worker.pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: identify(pid) is None, 10, "the worker is gone")

    bench.launcher.check_run_worker_health(bench.run)

    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("field", ["boot_id", "started"])
def test_another_process_with_the_same_pid_is_not_the_worker(bench, field):
    me = identify(os.getpid())
    other = {"boot_id": "an-earlier-boot"} if field == "boot_id" else {"started": me.started - 1}
    stranger = msgspec.structs.replace(me, **other)
    bench.instance.add_run_tags(bench.run_id, {WORKER_TAG: msgspec.json.encode(stranger).decode()})

    assert bench.launcher.check_run_worker_health(bench.run).status is WorkerStatus.FAILED


def test_a_run_without_a_recorded_worker_is_not_healthy(bench):
    assert bench.launcher.check_run_worker_health(bench.run).status is WorkerStatus.NOT_FOUND


def test_terminating_interrupts_the_worker_and_the_run_ends_as_canceled(bench):
    bench.launch()

    assert bench.launcher.terminate(bench.run_id)

    bench.wait_for(dg.DagsterRunStatus.CANCELED)
    wait_until(lambda: not is_running(bench.worker), 20, "the worker is gone")
    assert not bench.launcher.terminate(bench.run_id)


def test_terminating_a_run_whose_worker_is_gone_ends_it(bench):
    bench.launch()
    kill(bench.worker)
    wait_until(lambda: not is_running(bench.worker), 10, "the worker is gone")

    assert bench.launcher.terminate(bench.run_id)

    assert bench.run.status is dg.DagsterRunStatus.CANCELED
