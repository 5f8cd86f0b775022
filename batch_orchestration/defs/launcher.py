"""The run launcher: each run is a detached process of this machine with a health check.

Dagster's default launcher hands runs to the code server and loses track of them once that is gone:
after a reboot, or a `kill -9` of everything, its runs stay "started" forever and keep the `gpu`
pool. This launcher records the worker's identity on the run itself, so that any later daemon can
check whether the worker still lives. Workers survive a restart of Dagster. A worker that lives but
hangs is ended, so that Dagster's run retries start it again: see `workers/watch.py`.

The instance imports this module (`dagster.yaml`) before there is any code location, so the package
must be installed.
"""

import contextlib
import logging
import os
import signal
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import dagster as dg
import msgspec
from dagster._core.errors import DagsterLaunchFailedError
from dagster._core.launcher.base import (
    CheckRunHealthResult,
    LaunchRunContext,
    RunLauncher,
    WorkerStatus,
)
from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import ConfigurableClass, ConfigurableClassData

from batch_orchestration.engines.processes.records import identify, is_running
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.sharing import keep_from_others
from batch_orchestration.settings import Settings, load_settings
from batch_orchestration.workers.cleanup import (
    WORKER_TAG,
    RecordedWorker,
    clear_after,
    end_worker,
    recorded_worker,
)
from batch_orchestration.workers.heartbeat import WorkerHealth, WorkerState
from batch_orchestration.workers.heartbeat_files import read_last_heartbeat
from batch_orchestration.workers.watch import WorkerWatch

logger = logging.getLogger(__name__)

#: Lines of a dead worker's log that are shown with the run's failure.
SHOWN_LOG_LINES = 20
#: Fields of an op's config with keys of the user's choice; `env` is an ordinary key there.
_FREE_PAIRS = frozenset({("config", "metadata"), ("config", "overrides")})


class LocalProcessRunLauncher(RunLauncher[dg.DagsterInstance], ConfigurableClass):
    """Starts each run in its own session and identifies it by pid, start time and boot id.

    Config `log_dir`: folder of the workers' logs; default `<data folder>/logs/runs`.
    """

    def __init__(
        self, log_dir: str | None = None, inst_data: ConfigurableClassData | None = None
    ) -> None:
        keep_from_others()  # the daemon's files, and those of every worker that it starts
        self._inst_data = inst_data
        self._log_dir = log_dir
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._watch: WorkerWatch | None = None
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        """The data from which Dagster builds the same launcher in another process."""
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """Return the config schema for `dagster.yaml`."""
        return {"log_dir": dg.Field(dg.StringSource, is_required=False)}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> Self:
        """Build the launcher from `dagster.yaml`."""
        return cls(inst_data=inst_data, **config_value)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Start the worker, detached: neither Ctrl-C nor the end of Dagster reaches it."""
        self._reap()
        refuse_names_of_variables(context.dagster_run.run_config)
        run_id = context.dagster_run.run_id
        log_path = self._log_path(run_id)
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            worker = subprocess.Popen(
                self._command(context),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._workers[run_id] = worker
        if identity := identify(worker.pid):
            record = RecordedWorker(identity.pid, identity.started, identity.boot_id, run_id)
            self._instance.add_run_tags(run_id, {WORKER_TAG: msgspec.json.encode(record).decode()})
        try:
            self._instance.report_engine_event(
                f"Started run worker {worker.pid}; its log is {log_path}",
                context.dagster_run,
                cls=self.__class__,
            )
        except Exception as error:  # noqa: BLE001 - of any storage: the worker is at work
            logger.warning("cannot report the start of run worker %d: %s", worker.pid, error)

    def dispose(self) -> None:
        """Let go of the workers, which are detached and outlive this process."""
        self._reap()
        for worker in self._workers.values():
            worker.returncode = 0  # Python warns of a forgotten child that still runs.
        self._workers.clear()

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Whether the launcher has health checks; the default launcher has none."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Check whether the run's own worker process exists and does its work.

        A worker that exists but hangs is ended first; the engine that it leaves is cleaned up.
        """
        self._reap()
        settings = _settings_if_valid()
        folder = _folder_of(settings)
        worker = recorded_worker(run.run_id, run.tags, folder)
        if worker is None:
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "no run worker was recorded")
        pid, problem = str(worker.pid), "is gone"
        if is_running(worker.process):
            health = self._judge(worker, run, settings)
            if health is None or health.state is WorkerState.ALIVE:
                return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=pid)
            problem = f"was {health.state} and has been killed: {health.reason}"
            end_worker(worker.process)
            self._reap()
        if folder is not None and clear_after(run.run_id, folder):
            problem += "; the engine that it left has been ended"
        return CheckRunHealthResult(
            WorkerStatus.FAILED, f"run worker {pid} {problem}", run_worker_id=pid
        )

    def _judge(
        self, worker: RecordedWorker, run: dg.DagsterRun, settings: Settings | None
    ) -> WorkerHealth | None:
        """Judge a worker by its heartbeats; None if that is impossible.

        The settings may be invalid, or the worker may be of a version without heartbeats.
        """
        if worker.run_id is None or settings is None:
            return None
        if self._watch is None:
            self._watch = WorkerWatch(silent_seconds=settings.silent_seconds)
        last_heartbeat = None
        with contextlib.suppress(OSError):
            last_heartbeat = read_last_heartbeat(
                DataFolder(settings.data_dir).heartbeat_path(run.run_id)
            )
        return self._watch.check(run.run_id, last_heartbeat)

    def get_run_worker_debug_info(
        self, run: dg.DagsterRun, include_container_logs: bool | None = True
    ) -> str | None:
        """Return the last lines of the worker's log; None if it has none."""
        try:
            with self._log_path(run.run_id).open(errors="replace") as log:
                tail = "".join(deque(log, maxlen=SHOWN_LOG_LINES))
        except FileNotFoundError:
            return None
        return f"Last lines of {self._log_path(run.run_id)}:\n{tail}" if tail else None

    def terminate(self, run_id: str) -> bool:
        """Ask the worker to stop: it flushes, stops its engine and ends the run as canceled."""
        run = self._instance.get_run_by_id(run_id)
        if run is None or run.is_finished:
            return False
        self._instance.report_run_canceling(run)
        worker = recorded_worker(run.run_id, run.tags, _folder_of(_settings_if_valid()))
        if worker is not None and is_running(worker.process):
            os.kill(worker.pid, signal.SIGINT)
        else:
            self._instance.report_run_canceled(run, "Canceled; the run worker was already gone.")
        return True

    def _command(self, context: LaunchRunContext) -> Sequence[str]:
        origin = context.job_code_origin
        assert origin is not None, "a run that can be launched knows its code"
        command = ExecuteRunArgs(
            job_origin=origin,
            run_id=context.dagster_run.run_id,
            instance_ref=self._instance.get_ref(),
            set_exit_code_on_failure=True,
        ).get_command_args()
        # However Dagster was started there, this interpreter has the code. The name `dagster` would
        # be looked up in PATH, where another environment may come first.
        dagsters = command[command.index("api") :]
        run = context.dagster_run
        return [
            origin.repository_origin.executable_path,
            *("-m", "batch_orchestration.defs.run_worker", run.run_id, run.job_name),
            *dagsters,
        ]

    def _log_path(self, run_id: str) -> Path:
        folder = Path(self._log_dir) if self._log_dir else load_settings().data_dir / "logs/runs"
        return folder.resolve() / f"{run_id}.log"

    def _reap(self) -> None:
        """Reap workers that ended; they stay zombies until then."""
        for run_id, worker in list(self._workers.items()):
            if worker.poll() is not None:
                del self._workers[run_id]


def refuse_names_of_variables(config: object, *, place: tuple[str, ...] = ()) -> None:
    """Refuse a run whose config makes the worker read an environment variable.

    Dagster replaces `{"env": NAME}` with the variable's value in every text and number of any
    config, and each of these may be displayed. Any user of the launchpad could otherwise read every
    secret of the service.

    Raises:
        DagsterLaunchFailedError: The config names a variable; the message has the place.
    """
    free = place[:1] == ("ops",) and place[2:] in _FREE_PAIRS
    if isinstance(config, Mapping):
        if not free and list(config) == ["env"]:
            raise DagsterLaunchFailedError(  # type: ignore[no-untyped-call]
                f"the run config names an environment variable at {'.'.join(place)}, and a run may"
                " read none: write the value itself. Keys and passwords are settings (BATCH_*)"
            )
        for name, value in config.items():
            refuse_names_of_variables(value, place=(*place, name))
    elif isinstance(config, Sequence) and not isinstance(config, str):
        for value in config:
            refuse_names_of_variables(value, place=(*place, "[]"))


def _settings_if_valid() -> Settings | None:
    """Return the settings; None if they are invalid: a dead worker is noticed without them."""
    try:
        return load_settings()
    except ValueError as error:  # pydantic's ValidationError is one, too
        logger.warning("cannot judge workers by their heartbeats: %s", error)
        return None


def _folder_of(settings: Settings | None) -> DataFolder | None:
    return None if settings is None else DataFolder(settings.data_dir)
