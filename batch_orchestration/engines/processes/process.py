"""One server as a child process, started and ended with its whole process group."""

import atexit
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from batch_orchestration.core.errors import EngineStartFailed
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.engines.processes import guarded_exec, logs, sockets
from batch_orchestration.engines.processes import records as process_records
from batch_orchestration.engines.processes.environment import child_environment
from batch_orchestration.engines.processes.parent_guard import GUARD_VARIABLE
from batch_orchestration.engines.processes.records import ProcessRecord

Launch = Callable[[Path], tuple[Sequence[str], Mapping[str, str | None]]]
"""From Unix socket to command and additional environment; see `child_environment`."""

_GUARDED_EXEC = str(Path(guarded_exec.__file__).resolve())
_Call = tuple["Future[subprocess.Popen[bytes]]", Sequence[str], Mapping[str, str], BinaryIO]


class _Spawner:
    """The one thread that starts processes, and the calls that wait for it.

    The kernel kills a guarded process when the thread that started it ends (prctl(2)).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def spawn(
        self, command: Sequence[str], env: Mapping[str, str], output: BinaryIO
    ) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="spawner", daemon=True)
                self._thread.start()
        future: Future[subprocess.Popen[bytes]] = Future()
        self._calls.put((future, command, env, output))
        return future.result()

    def _serve(self) -> None:
        while True:
            future, command, env, output = self._calls.get()
            try:
                future.set_result(_popen(command, env, output))
            except OSError as error:
                future.set_exception(error)


def _popen(
    command: Sequence[str], env: Mapping[str, str], output: BinaryIO
) -> "subprocess.Popen[bytes]":
    guarded = [sys.executable, "-I", "-S", _GUARDED_EXEC, str(os.getpid()), "--", *command]
    return subprocess.Popen(
        guarded,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


_spawner = _Spawner()


def spawn_guarded(
    command: Sequence[str], *, env: Mapping[str, str], output: BinaryIO
) -> "subprocess.Popen[bytes]":
    """Start a command as the leader of its own session; it dies when this process dies.

    Raises:
        OSError: The command cannot be started.
    """
    return _spawner.spawn(command, env, output)


def _forget_thread() -> None:
    global _spawner
    _spawner = _Spawner()


# A forked child has the object, but not its thread.
os.register_at_fork(after_in_child=_forget_thread)


logger = logging.getLogger(__name__)
STOP_GRACE_SECONDS = 15.0
#: Begins the reason of a server that was ended on request.
STOPPED = "was stopped"
#: Without its API server, vLLM's EngineCore does not act on SIGTERM: waiting is pointless.
ORPHAN_GRACE_SECONDS = 1.0


class ServerProcess(Protocol):
    """A server's process as its engine sees it: a child of ours, or of an engine host."""

    name: str

    @property
    def pid(self) -> int | None:
        """Pid of the server, which is also the id of its process group; None if there is none."""

    @property
    def log_path(self) -> Path:
        """The server's log."""

    @property
    def log_size(self) -> int:
        """Current size of the log in bytes."""

    @property
    def socket(self) -> Path | None:
        """Socket of the server, if there is one."""

    def obtain(self, launch: Launch, before_start: Callable[[], None]) -> EngineInfo | None:
        """Use a warm server, or end what an earlier one left and start a new one.

        Returns:
            The information that another run announced of a warm server; None for a new one.

        Args:
            before_start: Called before a server is started, and not if a warm one is used; whatever
                it raises, this raises, and no server is started.

        Raises:
            EngineStartFailed: The server cannot be started.
        """

    def announce(self, info: EngineInfo) -> None:
        """Leave the description of a server that is ready to later runs."""

    def note_members(self) -> None:
        """Record the processes that the server has started, so that they can be found later."""

    def exit_reason(self) -> str | None:
        """Return how the server ended; None while it runs or if there never was one."""

    def stop(self) -> None:
        """End the whole process group, whoever uses it, and wait until it is gone. Idempotent.

        Raises:
            EngineError: A process outlived SIGKILL; device memory may still be held.
        """

    def release(self) -> None:
        """End this use of the server, which may stay warm for others. Idempotent."""

    def last_log_lines(
        self, count: int, *, since: int = 0, tail_bytes: int = logs.TAIL_BYTES
    ) -> list[str]:
        """Return the server's last log lines since it was started, and after byte `since`."""


class EngineProcess:
    """A server's process group, from `spawn` to `stop`; it may be spawned again afterwards.

    Every method may be called from any thread. The group ends with this object's `stop`, at the
    interpreter's exit, or by the kernel when this process is killed. Processes that survive all of
    these are ended by the next `spawn` with the same record path, in any process.
    """

    def __init__(self, *, name: str, log_path: Path, record_path: Path) -> None:
        self.name = name
        self.log_path = log_path
        self._record_path = record_path
        self._lock = threading.RLock()
        self._child: subprocess.Popen[bytes] | None = None
        self._record: ProcessRecord | None = None
        #: Socket of the running server, if it has one.
        self.socket: Path | None = None
        self.log_start = 0
        self._exit: str | None = None

    @property
    def pid(self) -> int | None:
        """Pid of the server, which is also the id of its process group; None if there is none."""
        child = self._child
        return None if child is None else child.pid

    def obtain(self, launch: Launch, before_start: Callable[[], None]) -> None:
        """Start a server; see `ServerProcess.obtain`."""
        self.stop()
        before_start()
        socket = sockets.choose_socket()
        self.spawn(*launch(socket), socket=socket)

    def announce(self, info: EngineInfo) -> None:
        """Do nothing: no other run uses this server."""

    def release(self) -> None:
        """End the server: no other run uses it."""
        self.stop()

    def spawn(
        self,
        command: Sequence[str],
        env: Mapping[str, str | None],
        *,
        socket: Path | None = None,
    ) -> None:
        """Start the server, after ending the remains of an earlier one.

        Args:
            env: Added to `child_environment`; None passes on our own value of a variable.
            socket: Path at which the server will listen (`sockets.choose_socket`). Its folder is
                created now, and removed when the server is ended.

        Raises:
            EngineStartFailed: It cannot be started, or its record belongs to a living process.
        """
        with self._lock:
            self.stop()
            self._end_left_over()
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            environment = child_environment({**env, GUARD_VARIABLE: str(os.getpid())})
            with self.log_path.open("ab") as log:
                self.log_start = log.tell()
                try:
                    if socket is not None:
                        sockets.make_private_folder(socket)
                        self.socket = socket
                    child = spawn_guarded(command, env=environment, output=log)
                except OSError as error:
                    self._remove_socket()
                    raise EngineStartFailed(f"{command[0]} cannot be started: {error}") from error
            self._child, self._exit = child, None
            atexit.register(self._stop_at_exit, os.getpid())
            self._write_record(child.pid, tuple(command))

    def note_members(self) -> None:
        """Record the processes that the server has started, so that they can be found later."""
        with self._lock:
            record = self._record
            if self._child is None or record is None:
                return
            group = process_records.group_members(self._child.pid)
            members = tuple(member for member in group if member != record.leader)
            if members != record.members:
                self._record = msgspec.structs.replace(record, members=members)
                process_records.write_record(self._record_path, self._record)

    def exit_reason(self) -> str | None:
        """Return how the server ended; None while it runs or if it was never spawned."""
        with self._lock:
            if self._child is None:
                return self._exit
            # WNOWAIT: until the leader is reaped, the group's id cannot be reused.
            ended = os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            if ended.si_code == os.CLD_EXITED:
                return f"exited with status {ended.si_status}"
            return f"was killed by {signal.Signals(ended.si_status).name}"

    def stop(self, *, grace_seconds: float = STOP_GRACE_SECONDS) -> None:
        """End the whole process group and wait until it is gone. Idempotent.

        Raises:
            EngineError: A process outlived SIGKILL; device memory may still be held.
        """
        with self._lock:
            child = self._child
            if child is None:
                return
            reason = self.exit_reason()
            if reason is not None:
                grace_seconds = min(grace_seconds, ORPHAN_GRACE_SECONDS)
            self._exit = reason or STOPPED
            process_records.end_group(child.pid, grace_seconds=grace_seconds)
            child.wait()
            self._child = self._record = None
            self._remove_socket()
            self._record_path.unlink(missing_ok=True)
            atexit.unregister(self._stop_at_exit)
            logger.info("%s (pid %d) is gone: it %s", self.name, child.pid, self._exit)

    def last_log_lines(
        self, count: int, *, since: int = 0, tail_bytes: int = logs.TAIL_BYTES
    ) -> list[str]:
        """Return the server's last log lines since it was spawned, and after byte `since`."""
        start = max(self.log_start, since)
        return logs.last_lines(self.log_path, count, start=start, tail_bytes=tail_bytes)

    @property
    def log_size(self) -> int:
        """Current size of the log in bytes."""
        return logs.size(self.log_path)

    def _stop_at_exit(self, owner_pid: int) -> None:
        # A forked child inherits the exit handler, but not the server.
        if os.getpid() == owner_pid:
            self.stop()

    def _remove_socket(self) -> None:
        if self.socket is not None:
            sockets.remove_socket(self.socket)
        self.socket = None

    def _end_left_over(self) -> None:
        record = process_records.read_record(self._record_path)
        if record is None:
            return
        if process_records.is_running(record.owner):
            if process_records.is_running(record.leader):
                raise EngineStartFailed(
                    f"{self._record_path} says that process {record.owner.pid}, which still runs, "
                    f"has a server of its own (pid {record.leader.pid}) here; stop that one first"
                )
            return
        if process_records.end_recorded(self._record_path):
            logger.warning("ended what an earlier process had left of %s", self.name)

    def _write_record(self, pid: int, command: tuple[str, ...]) -> None:
        leader = process_records.identify(pid)
        owner = process_records.identify(os.getpid())
        if leader is None or owner is None:
            return  # It has already ended; `exit_reason` reports that.
        self._record = ProcessRecord(
            leader=leader,
            owner=owner,
            members=(),
            command=command,
            host=os.uname().nodename,
            socket=str(self.socket or ""),
        )
        process_records.write_record(self._record_path, self._record)
