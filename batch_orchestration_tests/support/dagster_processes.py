"""Real Dagster: `dagster dev` in a deployment folder of its own, started, asked, killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
import yaml

from batch_orchestration.engines.processes.records import ProcessIdentity, is_running
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.store import Store
from batch_orchestration.workers.cleanup import recorded_worker
from batch_orchestration_tests.support.builders import believe_the_clock
from batch_orchestration_tests.support.dagster_client import DagsterClient, Run
from batch_orchestration_tests.support.raw_server import free_port

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {
    "BATCH_ENGINE": "simulated",
    "BATCH_MODEL_ALIASES": '{"*": "simulated-model"}',
    "BATCH_SETTLE_SECONDS": "0.5",
}
UNREACHABLE = "DagsterUserCodeUnreachableError"
START_SECONDS = 300.0
STOP_SECONDS = 40.0
#: Times the seconds that a test gives up after: a busy machine has other work.
PATIENCE = 5
#: Between two looks at a deployment: each costs the web server or the store's readers something.
LOOK_SECONDS = 1.0

T = TypeVar("T")


class DagsterProcesses(DagsterClient):
    """One deployment: a folder with the repository's own `dagster.yaml`, polling faster."""

    def __init__(self, root: Path, settings: Mapping[str, str], *, poll_seconds: int = 1) -> None:
        super().__init__(free_port())
        self.root = root
        self.folder = DataFolder(root / "data")
        self.folder.create()
        believe_the_clock(self.folder)
        self._settings = {**SETTINGS, **settings}
        self._dev: subprocess.Popen[bytes] | None = None
        instance = yaml.safe_load((REPOSITORY / "dagster.yaml").read_text())
        instance["run_monitoring"]["poll_interval_seconds"] = poll_seconds
        (root / "dagster.yaml").write_text(yaml.safe_dump(instance))
        shutil.copy(REPOSITORY / "pyproject.toml", root)

    @property
    def store(self) -> Store:
        return Store(self.folder.duckdb, deadline_seconds=30)

    # --- processes --------------------------------------------------------------------------------

    def start(self) -> None:
        """Run `dagster dev`, no arguments but the port, and wait until it answers."""
        with (self.root / "dagster-dev.log").open("ab") as log:
            self._dev = subprocess.Popen(
                [sys.executable, "-m", "dagster", "dev", "--port", str(self.port)],
                cwd=self.root,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Started by a shell with `&` we would hand down an ignored SIGINT, with which
                # Dagster ignores SIGTERM, too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        wait_until(self._answers, START_SECONDS, f"dagster dev answers:\n{self.log_tail()}")

    def stop(self) -> None:
        """Stop everything that was started here, whatever state it is in."""
        self._kill_session()
        for worker in self._live_workers():
            kill(worker)

    def kill_everything(self) -> None:
        """`kill -9` of web server, daemon, code server and run workers: a power cut, but for us."""
        workers = self._live_workers()
        self._kill_session()
        for worker in workers:
            kill(worker)

    def kill_worker(self, run: Run) -> None:
        """`kill -9` of the worker of a run."""
        kill(self.worker(run))

    def worker(self, run: Run) -> ProcessIdentity:
        """The worker of a run, as recorded."""
        return self._workers()[run.run_id]

    def kill_daemon(self) -> None:
        """`kill -9` of the daemon alone."""
        assert self._dev is not None
        (daemon,) = [
            pid
            for pid in _session_members(self._dev.pid)
            if b"dagster._daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        _signal(daemon, signal.SIGKILL)

    def is_up(self) -> bool:
        """Whether `dagster dev` has not ended."""
        return self._dev is not None and self._dev.poll() is None

    def log_tail(self, lines: int = 40) -> str:
        path = self.root / "dagster-dev.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _kill_session(self) -> None:
        if self._dev is None:
            return
        # `dagster dev` leads a session of its own, and all but the run workers stay in it.
        for pid in _session_members(self._dev.pid):
            _signal(pid, signal.SIGKILL)
        self._dev.wait(STOP_SECONDS)
        self._dev = None

    @contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        """Dagster's storage, behind the back of whatever still runs."""
        # Its folders are relative to the deployment's.
        with chdir(self.root), dg.DagsterInstance.from_config(str(self.root)) as instance:
            yield instance

    def _workers(self) -> dict[str, ProcessIdentity]:
        """The workers on record, by run id."""
        with self.instance() as instance:
            tags = {run.run_id: run.tags for run in instance.get_runs(limit=200)}
        workers = {run_id: recorded_worker(run_id, tags[run_id]) for run_id in tags}
        return {run_id: worker.process for run_id, worker in workers.items() if worker}

    def _live_workers(self) -> list[ProcessIdentity]:
        return [worker for worker in self._workers().values() if is_running(worker)]

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("BATCH_", "DAGSTER_"))
        }
        # Else each test would leave an engine for ten minutes; `test_engine_hosts` keeps them warm.
        return {**kept, "BATCH_ENGINE_KEEP_ALIVE": "0", **self._settings}

    def _answers(self) -> bool:
        assert self._dev is not None
        assert self._dev.poll() is None, f"dagster dev ended:\n{self.log_tail()}"
        return self._located()

    def _located(self) -> bool:
        """Whether the web server has loaded our code."""
        query = """{ workspaceOrError { ... on Workspace { locationEntries {
            locationOrLoadError { __typename ... on PythonError { message } } } } } }"""
        try:
            entries = self.graphql(query)["workspaceOrError"]["locationEntries"]
        except OSError:
            return False
        located = [entry["locationOrLoadError"] for entry in entries]
        messages = [location["message"] for location in located if "message" in (location or ())]
        # A code server that is a service of its own may come up last.
        assert all(UNREACHABLE in message for message in messages), messages
        return bool(located) and all(located) and not messages

    # --- use --------------------------------------------------------------------------------------

    def drop(self, name: str, content: bytes) -> None:
        """Put a file into the inbox, as a careful person does."""
        path = self.folder.inbox / name
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.write_bytes(content)
        temporary.rename(path)

    def command(self, *arguments: str) -> str:
        """Run a command of the command line beside it; return what it says."""
        ended = subprocess.run(
            [sys.executable, "-m", "batch_orchestration", *arguments],
            cwd=self.root,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def simulate(self, **conditions: Any) -> None:
        """Set what holds for all requests to the simulated engine."""
        path = self.folder.root / "simulated.json"
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(conditions))
        temporary.replace(path)

    # --- waiting ----------------------------------------------------------------------------------

    def wait_for_batch(self, stem: str, *, seconds: float = 90.0) -> str:
        """Wait until a batch of this name is admitted and Dagster has its partitions."""

        def known() -> str | None:
            for key in self.partitions("batch_manifest")["materialized"]:
                if key.startswith(f"{stem}-"):
                    return key
            return None

        return self.wait_until(known, seconds, f"{stem} is admitted")

    def wait_for_status(self, batch_id: str, status: str, *, seconds: float = 120.0) -> None:
        self.wait_until(
            lambda: self.store.batch(batch_id).status == status, seconds, f"{batch_id} is {status}"
        )

    def wait_for_run(self, run_id: str, *, seconds: float = 90.0) -> Run:
        def ended() -> Run | None:
            run = next(run for run in self.runs() if run.run_id == run_id)
            return run if run.ended else None

        return self.wait_until(ended, seconds, f"run {run_id} ends")

    def wait_until(
        self,
        condition: Callable[[], T | None],
        seconds: float,
        what: str,
        *,
        look_seconds: float = LOOK_SECONDS,
    ) -> T:
        try:
            return wait_until(condition, seconds, what, look_seconds=look_seconds)
        except AssertionError as error:
            runs = "\n".join(f"{run.run_id} {run.job} {run.status}" for run in self.runs())
            raise AssertionError(f"{error}\n{runs}\n{self.log_tail()}") from error


@contextmanager
def dagster_dev(
    root: Path, *, poll_seconds: int = 1, **settings: str
) -> Iterator[DagsterProcesses]:
    """Run `dagster dev` in a folder until the end of the block."""
    processes = DagsterProcesses(root, settings, poll_seconds=poll_seconds)
    try:
        processes.start()
        yield processes
    finally:
        processes.stop()


def wait_until(
    condition: Callable[[], T | None], seconds: float, what: str, *, look_seconds: float = 0.25
) -> T:
    """Return the first true value of the condition."""
    deadline = time.monotonic() + PATIENCE * seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {PATIENCE * seconds:.0f} s: {what}"
        time.sleep(look_seconds)
    return value


def kill(process: ProcessIdentity) -> None:
    """`kill -9` of exactly this process."""
    if is_running(process):
        _signal(process.pid, signal.SIGKILL)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _session_members(session: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(ProcessLookupError):
                if os.getsid(int(entry.name)) == session:
                    members.append(int(entry.name))
    return members
