"""What the fault tests start, wait for and look at."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from batch_orchestration.engines.processes.parent_guard import GUARD_VARIABLE
from batch_orchestration.engines.processes.records import (
    ProcessIdentity,
    group_members,
    identify,
    is_running,
    read_record,
)

#: A leader with two children, none of which ends by itself.
FAMILY = ["sh", "-c", "sleep 300 & sleep 300 & wait"]


def wait_until(condition: Callable[[], bool], seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so in {seconds:g} s"
        time.sleep(0.02)


def ended_within(seconds: float, processes: Iterable[ProcessIdentity]) -> bool:
    left = list(processes)
    deadline = time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left = [process for process in left if is_running(process)]
    return not left


def wait_for_group(pid: int | None, count: int) -> list[ProcessIdentity]:
    """Return the group of that leader, leader first, as soon as it has so many members."""
    assert pid is not None
    wait_until(lambda: len(group_members(pid)) == count)
    return sorted(group_members(pid), key=lambda member: member.pid != pid)


def kill(process: ProcessIdentity) -> None:
    """Kill exactly this process; one that has ended is left in peace."""
    if is_running(process):
        os.kill(process.pid, signal.SIGKILL)


def nobody() -> ProcessIdentity:
    """Return a process that has ended."""
    process = subprocess.Popen(["sleep", "300"])
    identity = identify(process.pid)
    process.kill()
    process.wait()
    assert identity is not None
    return identity


@contextlib.contextmanager
def engine_owner(
    kind: str, log_path: Path, ending: str = "wait"
) -> Iterator["subprocess.Popen[str]"]:
    """Start `engine_owner` and wait until its engine is ready."""
    command = [sys.executable, "-m", "batch_orchestration_tests.fault.engine_owner"]
    with subprocess.Popen(
        [*command, kind, str(log_path), ending],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as owner:
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "ready\n"
            yield owner
        finally:
            owner.kill()
            owner.communicate()


def recorded(log_path: Path) -> list[ProcessIdentity]:
    """Return the processes of the engine with this log, as recorded; the server first."""
    record = read_record(log_path.with_suffix(".process.json"))
    assert record is not None
    return [record.leader, *record.members]


def socket_of(log_path: Path) -> Path:
    """Return where the engine with this log listens, or did, as recorded."""
    record = read_record(log_path.with_suffix(".process.json"))
    assert record is not None
    return Path(record.socket)


@contextlib.contextmanager
def guarded_family(
    method: str, *, guarded: bool
) -> Iterator[tuple["subprocess.Popen[str]", ProcessIdentity]]:
    """Start `guarded_family`; yield the parent, and the child that has registered the guard."""
    command = [sys.executable, "-m", "batch_orchestration_tests.fault.guarded_family", method]
    env = {**os.environ, **({GUARD_VARIABLE: "1"} if guarded else {})}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = identify(int(parent.stdout.readline()))
        assert child is not None
        try:
            yield parent, child
        finally:
            parent.kill()
            kill(child)
