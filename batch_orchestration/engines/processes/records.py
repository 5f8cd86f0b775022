"""Identifies processes beyond their pid: only recorded processes are found again and ended.

Linux only, as is vLLM.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import EngineError
from batch_orchestration.engines.processes.sockets import remove_socket
from batch_orchestration.files.regular import NO_DESCRIPTOR, read_regular

PROC = Path("/proc")
POLL_SECONDS = 0.05
#: A process killed by SIGKILL can still be busy in the kernel, freeing device memory.
KILL_SECONDS = 30.0


class ProcessIdentity(msgspec.Struct, frozen=True):
    """One process of one boot; a pid alone is reused.

    Attributes:
        started: Clock ticks from boot to its start (field 22 of proc(5), `/proc/<pid>/stat`).
        boot_id: The boot from which `started` counts.
    """

    pid: int
    started: int
    boot_id: str


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a server and its process group.

    Attributes:
        leader: The server; its pid is the id of the process group.
        owner: The process that started it.
        members: The other processes of the group, as far as they were observed.
        command: For display; never used to find a process.
        socket: Path at which the server listens, if any; removed with the server's remains.
        host: Name of the machine, for display: its boot id is compared.
    """

    leader: ProcessIdentity
    owner: ProcessIdentity
    members: tuple[ProcessIdentity, ...]
    command: tuple[str, ...]
    socket: str = ""
    host: str = ""


def boot_id() -> str:
    """Return the kernel's id of this boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> ProcessIdentity | None:
    """Return the process that has this pid now; None if there is none, or only a zombie."""
    stat = _stat(pid)
    return None if stat is None else ProcessIdentity(pid, stat.started, boot_id())


def is_running(process: ProcessIdentity) -> bool:
    """Return whether exactly this process still runs."""
    return identify(process.pid) == process


def group_members(group: int) -> list[ProcessIdentity]:
    """Return the running processes of a process group, its leader included."""
    boot = boot_id()
    pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    found = ((pid, _stat(pid)) for pid in pids)
    return [
        ProcessIdentity(pid, stat.started, boot)
        for pid, stat in found
        if stat is not None and stat.group == group
    ]


def end_group(group: int, *, grace_seconds: float) -> None:
    """End a process group and wait until it is gone: SIGTERM, and SIGKILL after the grace period.

    The caller has verified that the group is the intended one.

    Raises:
        EngineError: A member outlived SIGKILL for half a minute.
    """
    _signal_group(group, signal.SIGTERM)
    # A stopped process acts on SIGTERM only once it is continued; systemd does the same.
    _signal_group(group, signal.SIGCONT)
    if _wait_for_group(group, grace_seconds):
        return
    _signal_group(group, signal.SIGKILL)
    if not _wait_for_group(group, KILL_SECONDS):
        raise EngineError(f"process group {group} outlived SIGKILL for {KILL_SECONDS:.0f} s")


def read_record(path: Path) -> ProcessRecord | None:
    """Return the record at a path; None if there is none, or none that can be read.

    Raises:
        OSError: This process has no free file descriptor.
    """
    try:
        return msgspec.json.decode(read_regular(path), type=ProcessRecord)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return None


def write_record(path: Path, record: ProcessRecord) -> None:
    """Write the record atomically, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    part.replace(path)


def end_recorded(path: Path, *, grace_seconds: float = 10.0) -> bool:
    """End the process group of a record if it is a leftover, and remove the record.

    Pid, start time and boot must all agree, for the leader or for another recorded member. Then the
    group has never been empty, so its id cannot have been reused. A group whose owner still runs is
    no leftover and is not touched.

    Returns:
        Whether there was a process to end.

    Raises:
        EngineError: See `end_group`.
    """
    record = read_record(path)
    if record is None or is_running(record.owner):
        return False
    group = record.leader.pid
    left = set(group_members(group)) & {record.leader, *record.members}
    if left:
        end_group(group, grace_seconds=grace_seconds)
    if record.socket:
        remove_socket(Path(record.socket))
    path.unlink(missing_ok=True)
    return bool(left)


class _Stat(msgspec.Struct, frozen=True):
    group: int
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # A process hidden from us (`hidepid`) is not ours.
        return None
    # The second field is the program's name in parentheses; it may contain anything.
    fields = text.rpartition(")")[2].split()
    # If pid 1 reaps no orphans, a zombie may stay indefinitely; it holds no memory.
    if fields[0] in "ZX":
        return None
    return _Stat(group=int(fields[2]), started=int(fields[19]))


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _wait_for_group(group: int, seconds: float) -> bool:
    """Wait until no process of the group runs; return whether that is so."""
    deadline = time.monotonic() + seconds
    # Scanning all processes of the machine takes much longer than checking the known ones.
    left = group_members(group)
    while left:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
        left = [member for member in left if is_running(member)] or group_members(group)
    return True
