"""Who a process is, beyond its pid: found again, and ended, only by what was recorded of it.

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
#: A process killed by SIGKILL can still be busy in the kernel, giving back device memory.
KILL_SECONDS = 30.0


class ProcessIdentity(msgspec.Struct, frozen=True):
    """One process of one boot; a pid alone is reused.

    Attributes:
        started: Clock ticks from boot to its start (field 22 of proc(5), `/proc/<pid>/stat`).
        boot_id: Of the boot that `started` counts from.
    """

    pid: int
    started: int
    boot_id: str


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was written down about a server and its process group.

    Attributes:
        leader: The server; its pid is the id of the process group.
        owner: The process that started it.
        members: The other processes of the group, as far as they were seen.
        command: For people; never used to find anything.
        socket: At which the server listens, if it does; removed with what is left over.
    """

    leader: ProcessIdentity
    owner: ProcessIdentity
    members: tuple[ProcessIdentity, ...]
    command: tuple[str, ...]
    socket: str = ""


def boot_id() -> str:
    """Return the kernel's id of this boot."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> ProcessIdentity | None:
    """Return who has this pid at present; None if nobody, or only a zombie."""
    stat = _stat(pid)
    return None if stat is None else ProcessIdentity(pid, stat.started, boot_id())


def is_running(process: ProcessIdentity) -> bool:
    """Whether exactly this process still runs."""
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
    """End a process group and wait until it is gone: SIGTERM, and SIGKILL after the grace.

    The caller has made sure that the group is the one that is meant.

    Raises:
        EngineError: A member outlived SIGKILL for half a minute.
    """
    _signal_group(group, signal.SIGTERM)
    # A process that is stopped acts on it only when it goes on; systemd does the same.
    _signal_group(group, signal.SIGCONT)
    if _wait_for_group(group, grace_seconds):
        return
    _signal_group(group, signal.SIGKILL)
    if not _wait_for_group(group, KILL_SECONDS):
        raise EngineError(f"process group {group} outlived SIGKILL for {KILL_SECONDS:.0f} s")


def read_record(path: Path) -> ProcessRecord | None:
    """Return what was recorded; None if nothing was, or nothing that can be read."""
    try:
        return msgspec.json.decode(read_regular(path), type=ProcessRecord)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return None


def write_record(path: Path, record: ProcessRecord) -> None:
    """Write the record in one piece, replacing an older one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
    part.replace(path)


def end_recorded(path: Path, *, grace_seconds: float = 10.0) -> bool:
    """End the process group that a record describes, if it is left over; remove the record.

    Pid, start time and boot must all agree, for the leader or for another recorded member: then the
    group has never been empty and its id cannot have gone to anybody else. A group whose owner
    still runs is not left over and is not touched.

    Returns:
        Whether there was something to end.

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
        # A process that may not be looked at (`hidepid`) is not ours.
        return None
    # The second field is the program's name in parentheses; it may contain anything.
    fields = text.rpartition(")")[2].split()
    # An orphan's zombie may stay for ever where pid 1 reaps nobody; it holds no memory.
    if fields[0] in "ZX":
        return None
    return _Stat(group=int(fields[2]), started=int(fields[19]))


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _wait_for_group(group: int, seconds: float) -> bool:
    """Wait until nobody of the group runs; say whether that is so."""
    deadline = time.monotonic() + seconds
    # A look at all processes of the machine takes much longer than one at those that are known.
    left = group_members(group)
    while left:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
        left = [member for member in left if is_running(member)] or group_members(group)
    return True
