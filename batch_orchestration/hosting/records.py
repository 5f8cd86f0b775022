"""The engine hosts of a data folder: what they serve, where they listen, and how they are asked.

A host is found by its record alone, and counts only while exactly the recorded process runs.
Whoever looks for a host, starts one, or ends an idle one does so under `hosts_lock`.
"""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from filelock import BaseFileLock

from batch_orchestration.core.batches import settings_hash
from batch_orchestration.core.errors import EngineError
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.engines.processes.records import ProcessIdentity, is_running
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.sharing import shared_lock
from batch_orchestration.files.state_file import StateFile

RECORD_SUFFIX = ".host.json"
#: A host that is asked for its state answers from memory.
ANSWER_SECONDS = 10.0
#: Whoever holds `hosts_lock` waits for the gate, and for a server to end; not for one to start.
LOCK_SECONDS = 180.0
#: Ending a server takes its grace period, and half a minute more if a process outlives SIGKILL.
END_SECONDS = 60.0


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What two runs must agree on to share an engine.

    Attributes:
        kind: `vllm` or `simulated`.
        model: Folder or hub name.
        device: `cuda` or `cpu`; `kind` for a simulated engine.
        configured: Every setting of the server that a person chose; nothing derived from a batch.
        memory_level: Flags by which the memory level differs from the configured one.
    """

    kind: str
    model: str
    device: str
    configured: dict[str, Any]
    memory_level: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for engines that are the same."""
        return settings_hash(msgspec.to_builtins(self))[:16]


class HostOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a host is to do: the first message to it, from the run that starts it.

    Attributes:
        command: Starts the server at `socket`.
        env: See `EngineProcess.spawn`.
        log_path: Gets the output of the server.
        record_path: Of the server's processes.
        host_path: Of the host's own record.
        control: Unix socket at which the host is to listen.
        keep_alive_seconds: Time from the end of the last lease to the end of the engine.
    """

    data_dir: str
    spec: EngineSpec
    command: tuple[str, ...]
    env: dict[str, str | None]
    socket: str
    log_path: str
    record_path: str
    host_path: str
    control: str
    keep_alive_seconds: float


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a host is found.

    Attributes:
        control: Unix socket at which it listens.
        started_at: POSIX seconds.
    """

    host: ProcessIdentity
    control: str
    spec: EngineSpec
    started_at: float


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One message to a host; each is answered with a `HostState`.

    Attributes:
        what: `lease` makes the connection a lease until it ends; `state` only asks; `stop` ends the
            engine, whoever uses it; `stop idle` ends it unless it is leased.
        info: Of the engine that has become ready, for later runs.
    """

    what: Literal["lease", "state", "stop", "stop idle"] = "state"
    info: EngineInfo | None = None


class HostState(msgspec.Struct, frozen=True, kw_only=True):
    """What a host knows of its engine.

    Attributes:
        pid: The server's; None if it could not be started or has ended.
        log_start: Size of the log when the server was started, in bytes.
        ended: How the server ended; None while it runs.
        info: Announced by the run that started the engine, once it was ready; else None.
        leases: Runs that use the engine now.
        idle_seconds: Since the last lease ended; None while there is one.
    """

    pid: int | None
    socket: str
    log_path: str
    log_start: int
    ended: str | None
    info: EngineInfo | None
    leases: int
    idle_seconds: float | None


class HostGone(EngineError):
    """A host ended, or does not answer."""


class HostOfOtherVersion(HostGone):
    """A host answers what this version does not understand."""


def hosts_lock(folder: DataFolder) -> BaseFileLock:
    """Return the lock under which engines are found, started, and ended when idle."""
    folder.engines.mkdir(parents=True, exist_ok=True)
    return shared_lock(folder.engines / "hosts.lock")


def running_hosts(folder: DataFolder) -> Iterator[tuple[Path, HostRecord]]:
    """Yield the hosts that run, with the paths of their records.

    Raises:
        TooManyOpenFiles: No descriptor is left; retry later.
    """
    for path in sorted(folder.engines.glob(f"*{RECORD_SUFFIX}")):
        record = StateFile(path, HostRecord).read_if_sound()
        if record is not None and is_running(record.host):
            yield path, record


class HostConnection:
    """A connection to a host; a lease if it asks for one, which ends with this process.

    Raises:
        HostGone: From each method, once the host does not answer.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._socket.settimeout(ANSWER_SECONDS)
        self._file = connected.makefile("rb")

    @classmethod
    def open(cls, record: HostRecord) -> "HostConnection":
        """Connect to a running host."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.settimeout(ANSWER_SECONDS)
        try:
            connected.connect(record.control)
        except OSError as error:
            connected.close()
            raise HostGone(f"engine host {record.host.pid} cannot be reached: {error}") from error
        return cls(connected)

    def ask(self, message: Ask | HostOrder, *, seconds: float = ANSWER_SECONDS) -> HostState:
        """Send one message and return the answer."""
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(msgspec.json.encode(message) + b"\n")
            line = self._file.readline()
        except OSError as error:
            raise HostGone(f"the engine host does not answer: {error}") from error
        if not line.endswith(b"\n"):
            raise HostGone("the engine host has ended")
        try:
            return msgspec.json.decode(line, type=HostState)
        except msgspec.DecodeError as error:
            raise HostOfOtherVersion(f"the engine host is of another version: {error}") from error

    def close(self) -> None:
        """End the connection, and with it the lease. Idempotent."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()
