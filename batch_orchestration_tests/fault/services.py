"""The services of `deploy/systemd`, started as systemd starts them, in a folder of their own."""

import configparser
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from batch_orchestration_tests.support.dagster_processes import (
    REPOSITORY,
    START_SECONDS,
    STOP_SECONDS,
    DagsterProcesses,
    wait_until,
)
from batch_orchestration_tests.support.raw_server import free_port

UNITS = REPOSITORY / "deploy/systemd"
WORKSPACE = REPOSITORY / "deploy/workspace.yaml"
#: Where the units say that the project and its programs are.
INSTALLED = "/opt/batch_orchestration"
PROGRAMS = f"{INSTALLED}/.venv/bin"
#: Of the units; each test takes free ones.
CODE_PORT, WEB_PORT = "4266", "3000"


def read_unit(path: Path) -> configparser.ConfigParser:
    """Read a unit as far as its syntax is that of an INI file; repeated names are fine."""
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(path.read_text())
    return unit


class Services(DagsterProcesses):
    """Code, daemon and web server as services; each can be killed and started on its own."""

    def __init__(self, root: Path, settings: Mapping[str, str]) -> None:
        home = {"DAGSTER_HOME": str(root), "BATCH_DATA_DIR": str(root / "data")}
        super().__init__(root, {**settings, **home})
        self._code_port = str(free_port())
        (root / "deploy").mkdir()
        workspace = WORKSPACE.read_text().replace(CODE_PORT, self._code_port)
        (root / "deploy/workspace.yaml").write_text(workspace)
        self._services: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all of them and wait until the web server answers."""
        self.start_service("instance")
        assert self._services.pop("instance").wait(START_SECONDS) == 0, self.log_tail()
        for name in ("code", "daemon", "webserver"):
            self.start_service(name)
        wait_until(self._answers, START_SECONDS, f"the services answer:\n{self.log_tail()}")

    def start_service(self, name: str) -> None:
        """Start one with the command of its unit."""
        command = read_unit(UNITS / f"batch-orchestration-{name}.service")["Service"]["ExecStart"]
        command = command.replace(PROGRAMS, str(Path(sys.executable).parent))
        command = command.replace(CODE_PORT, self._code_port).replace(WEB_PORT, str(self.port))
        with (self.root / "dagster-dev.log").open("ab") as log:
            self._services[name] = subprocess.Popen(
                shlex.split(command),
                cwd=self.root,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def end_service(self, name: str, number: signal.Signals) -> None:
        """Send one its last signal: to its main process alone, as `KillMode=process` does."""
        service = self._services.pop(name)
        service.send_signal(number)
        try:
            service.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait(STOP_SECONDS)

    def stop(self) -> None:
        """End all services and what is left of their workers."""
        for name in list(self._services):
            self.end_service(name, signal.SIGKILL)
        super().stop()

    def _answers(self) -> bool:
        for name, service in self._services.items():
            assert service.poll() is None, f"{name} ended:\n{self.log_tail()}"
        return self._located()


@contextmanager
def services(root: Path, **settings: str) -> Iterator[Services]:
    """Run the services in a folder until the end of the block."""
    running = Services(root, settings)
    try:
        running.start()
        yield running
    finally:
        running.stop()
