"""Dagster as a child: started, waited for, and stopped with everything that it started in turn.

Run workers and engines leave Dagster's process group on purpose. So this process makes itself the
one that orphans come back to (prctl(2), PR_SET_CHILD_SUBREAPER): all that was started here stays
its descendant, and nothing has to be found by name.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
HOST = "localhost"
PORT = 3000
#: It took 16 to 45 s on two cores; a machine that is busy may need more.
START_SECONDS = 180.0
#: Dagster waits for what it runs in its own processes.
STOP_SECONDS = 30.0
#: Run workers flush their journals and stop their engine.
WORKER_STOP_SECONDS = 20.0
POLL_SECONDS = 0.5
SHOWN_LOG_LINES = 15
#: Between looks at whether the code server is still there.
MEND_SECONDS = 10.0
#: What Dagster says of a code server that has died, as against code that does not load.
UNREACHABLE = "DagsterUserCodeUnreachableError"
_LOCATIONS = """{ workspaceOrError { ... on Workspace { locationEntries {
  name locationOrLoadError { __typename ... on PythonError { message } } } } } }"""
_RELOAD = """mutation($name: String!) {
  reloadRepositoryLocation(repositoryLocationName: $name) { __typename } }"""


class DagsterFailed(Exception):
    """Dagster did not start, or ended; the message has its last words."""


class DagsterDev:
    """`dagster dev` in a folder; a context manager that leaves nothing running."""

    def __init__(self, folder: Path, *, log_path: Path, environ: Mapping[str, str]) -> None:
        self.port = _free_port(PORT)
        self._folder = folder
        self._log_path = log_path
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._mended_at = 0.0

    @property
    def url(self) -> str:
        """Address of the UI."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> "DagsterDev":
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "dagster", "dev", "--host", HOST, "--port", str(self.port)]
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for us; we stop Dagster in our own order.
                start_new_session=True,
                preexec_fn=_prepare_child,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def wait_until_ready(self, *, tell: Callable[[float], None]) -> None:
        """Wait until the web server answers and has loaded our code.

        Args:
            tell: Called with the seconds waited so far, about twice a second.

        Raises:
            DagsterFailed: It ended, cannot load the code, or takes too long.
        """
        started = time.monotonic()
        while not self._ready():
            self.check()
            waited = time.monotonic() - started
            if waited > START_SECONDS:
                raise self._failure(f"Dagster did not answer within {START_SECONDS:.0f} s")
            tell(waited)
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Make sure that it is still there.

        Raises:
            DagsterFailed: It ended.
        """
        assert self._process is not None
        if self._process.poll() is not None:
            raise self._failure(f"Dagster ended with exit code {self._process.returncode}")

    def mend(self) -> None:
        """Have the code loaded again if its server was killed, which `dagster dev` does not do.

        Until then no sensor ticks and no run starts. Call it often; it looks now and then.
        """
        if time.monotonic() - self._mended_at < MEND_SECONDS:
            return
        self._mended_at = time.monotonic()
        # A web server too busy to answer is asked again later.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for entry in self.graphql(_LOCATIONS)["workspaceOrError"]["locationEntries"]:
                location = entry["locationOrLoadError"] or {}
                if UNREACHABLE in location.get("message", ""):
                    self.graphql(_RELOAD, name=entry["name"])

    def graphql(self, query: str, **variables: object) -> Any:
        """Return the data of a GraphQL query."""
        request = urllib.request.Request(
            f"{self.url}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)["data"]

    def stop(self) -> None:
        """Stop Dagster, then whatever it left, gently first; return when nothing is left."""
        # A second Ctrl-C shall not leave half of it behind.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_SECONDS)
            _end_descendants()
        finally:
            signal.signal(signal.SIGINT, before)

    def _ready(self) -> bool:
        try:
            entries = self.graphql(_LOCATIONS)["workspaceOrError"]["locationEntries"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        loaded = [entry["locationOrLoadError"] for entry in entries]
        for location in loaded:
            if location and location["__typename"] == "PythonError":
                raise self._failure(f"Dagster cannot load the code: {location['message']}")
        return bool(loaded) and all(loaded)

    def _failure(self, what: str) -> DagsterFailed:
        lines = self._log_path.read_text(errors="replace").splitlines()[-SHOWN_LOG_LINES:]
        return DagsterFailed("\n".join([f"{what}. End of {self._log_path}:", *lines]))


def descendants() -> list[int]:
    """Return the pids of all processes that this one started, directly or not; no zombies."""
    parents = dict(_parents())
    found: set[int] = set()
    grown = {os.getpid()}
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown} - found
        found |= grown
    return sorted(found)


def _end_descendants() -> None:
    deadline = time.monotonic() + WORKER_STOP_SECONDS
    # Only our direct children: run workers stop their own engines, in order.
    for pid in [pid for pid, parent in _parents() if parent == os.getpid()]:
        _signal(pid, signal.SIGTERM)
    while left := descendants():
        if time.monotonic() > deadline:
            for pid in left:
                _signal(pid, signal.SIGKILL)
        _reap()
        time.sleep(0.1)
    _reap()


def _parents() -> Iterator[tuple[int, int]]:
    """Yield pid and parent's pid of every process that is not a zombie (proc(5), stat)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                yield int(stat.parent.name), int(parent)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _prepare_child() -> None:
    # With an ignored SIGINT, inherited from a shell's `&`, Dagster would ignore SIGTERM as well.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def _free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            chosen: int = probe.getsockname()[1]
            return chosen
    raise OSError("no free port on the loopback interface")
