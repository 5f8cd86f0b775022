"""Run workers that hang without being dead: stopped, blocked, or a zombie that nobody reaps."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batch_orchestration.engines.processes.records import ProcessIdentity
from batch_orchestration.workers.heartbeat_files import read_last_heartbeat
from batch_orchestration_tests.support.dagster_client import Run
from batch_orchestration_tests.support.dagster_processes import DagsterProcesses, wait_until

PR_SET_CHILD_SUBREAPER = 36


def stop(worker: ProcessIdentity) -> None:
    """SIGSTOP: it lives, and does nothing at all."""
    os.kill(worker.pid, signal.SIGSTOP)


def wait_for_blocked_loop(dagster: DagsterProcesses, run: Run) -> float:
    """Wait until heartbeats go on and the event loop does not; return when it last came round."""
    path = dagster.folder.heartbeat_path(run.run_id)

    def blocked() -> float | None:
        last_heartbeat = read_last_heartbeat(path)
        beat = last_heartbeat and last_heartbeat.current
        late = beat and beat.loop_at and beat.at - beat.loop_at > 2.5
        return beat.loop_at if beat and late else None

    return wait_until(blocked, 60, "the worker is blocked")


@contextmanager
def inheriting_orphans() -> Iterator[None]:
    """Let orphans become children of this process, which reaps them only at the end."""
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def reap(pid: int) -> None:
    """Let the kernel forget a zombie that this process has inherited."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def is_zombie(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "Z"
