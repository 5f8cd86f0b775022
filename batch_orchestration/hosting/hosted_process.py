"""A server owned by an engine host, used like a child process of our own."""

import contextlib
import logging
import secrets
import socket as sockets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import Timeout

from batch_orchestration import __version__
from batch_orchestration.core.batches import settings_hash
from batch_orchestration.core.errors import EngineStartFailed
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.engines.memory_fallback import MemoryFallback
from batch_orchestration.engines.processes import logs
from batch_orchestration.engines.processes.process import Launch
from batch_orchestration.engines.processes.sockets import choose_socket
from batch_orchestration.engines.vllm.flags import flags_of
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.hosting.hosts import end_idle_engines, end_leftovers
from batch_orchestration.hosting.records import (
    ANSWER_SECONDS,
    END_SECONDS,
    LOCK_SECONDS,
    RECORD_SUFFIX,
    Ask,
    EngineSpec,
    HostConnection,
    HostGone,
    HostOrder,
    HostState,
    hosts_lock,
    running_hosts,
)
from batch_orchestration.settings import EngineKind, Settings

logger = logging.getLogger(__name__)
#: A new host answers once it has started its server: a few imports and a fork.
HOST_START_SECONDS = 60.0


class HostedProcess:
    """The server of an engine host, from `obtain` to `release` or `stop`; see `EngineProcess`.

    A server that an equal engine left warm is used again. Otherwise idle engines are ended, which
    hold memory that the new one needs, and a host is started.

    Args:
        log_path: Of the server, if this run starts it.
        spec: Returns what the engine must be like now.
        keep_alive_seconds: See `HostOrder`.
    """

    def __init__(
        self,
        *,
        name: str,
        log_path: Path,
        folder: DataFolder,
        spec: Callable[[], EngineSpec],
        keep_alive_seconds: float,
    ) -> None:
        self.name = name
        self._own_log_path = log_path
        self._folder = folder
        self._spec = spec
        self._keep_alive_seconds = keep_alive_seconds
        self._lock = threading.RLock()
        self._lease: HostConnection | None = None
        self._state: HostState | None = None
        self._exit: str | None = None

    @property
    def pid(self) -> int | None:
        """Pid of the server, which is also the id of its process group; None if there is none."""
        return None if self._lease is None or self._state is None else self._state.pid

    @property
    def log_path(self) -> Path:
        """The server's log, which begins with the run that started it."""
        return self._own_log_path if self._state is None else Path(self._state.log_path)

    @property
    def socket(self) -> Path | None:
        """Socket of the server, if there is one."""
        return None if self._state is None else Path(self._state.socket)

    @property
    def log_size(self) -> int:
        """Current size of the log in bytes."""
        return logs.size(self.log_path)

    def obtain(self, launch: Launch, before_start: Callable[[], None]) -> EngineInfo | None:
        """Use a warm server, or start one; see `ServerProcess.obtain`."""
        with self._lock, self._alone():
            self.stop()
            spec = self._spec()
            if self._attach(spec):
                assert self._state is not None
                logger.info("%s (pid %s) is warm", self.name, self._state.pid)
                return self._state.info
            end_idle_engines(self._folder)
            end_leftovers(self._folder)
            before_start()
            self._start_host(spec, launch)
            return None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold `hosts_lock`.

        Raises:
            EngineStartFailed: Another process has held it for too long.
        """
        lock = hosts_lock(self._folder)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise EngineStartFailed(
                f"another process has held {lock.lock_file} for {LOCK_SECONDS:.0f} s;"
                f" `fuser {lock.lock_file}` shows which one"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def announce(self, info: EngineInfo) -> None:
        """Leave the description of a server that is ready to later runs."""
        self._ask(Ask(info=info))

    def note_members(self) -> None:
        """Do nothing: the host records the processes of its server."""

    def exit_reason(self) -> str | None:
        """Return how the server ended; None while it runs or if it was never obtained."""
        with self._lock:
            if self._lease is not None and (state := self._ask(Ask())) is not None:
                return state.ended
            return self._exit

    def stop(self) -> None:
        """End the server, whoever uses it, and wait until it is gone. Idempotent."""
        with self._lock:
            if self._lease is None:
                return
            state = self._ask(Ask(what="stop"), seconds=END_SECONDS)
            if state is not None:
                self._exit = state.ended
            self.release()

    def release(self) -> None:
        """End this lease; the server stays warm for others. Idempotent."""
        with self._lock:
            if self._lease is not None:
                self._lease.close()
            self._lease = None

    def last_log_lines(
        self, count: int, *, since: int = 0, tail_bytes: int = logs.TAIL_BYTES
    ) -> list[str]:
        """Return the server's last log lines since it was started, and after byte `since`."""
        start = max(self._state.log_start if self._state else 0, since)
        return logs.last_lines(self.log_path, count, start=start, tail_bytes=tail_bytes)

    def _attach(self, spec: EngineSpec) -> bool:
        """Lease a warm engine that is the same; return whether there was one."""
        for _, record in running_hosts(self._folder):
            if record.spec.key != spec.key:
                continue
            try:
                lease = HostConnection.open(record)
                state = lease.ask(Ask(what="lease"))
            except HostGone as error:
                logger.info("%s", error)
                continue
            if state.ended is None:
                self._lease, self._state, self._exit = lease, state, None
                return True
            lease.close()
        return False

    def _start_host(self, spec: EngineSpec, launch: Launch) -> None:
        server_socket = choose_socket()
        command, env = launch(server_socket)
        token = f"{spec.key}-{secrets.token_hex(4)}"
        self._own_log_path.parent.mkdir(parents=True, exist_ok=True)
        order = HostOrder(
            data_dir=str(self._folder.root),
            spec=spec,
            command=tuple(command),
            env=dict(env),
            socket=str(server_socket),
            log_path=str(self._own_log_path),
            record_path=str(self._own_log_path.with_name(f"{token}.process.json")),
            host_path=str(self._folder.engines / f"{token}{RECORD_SUFFIX}"),
            control=str(choose_socket()),
            keep_alive_seconds=self._keep_alive_seconds,
        )
        ours, theirs = sockets.socketpair()
        with theirs, self._own_log_path.with_suffix(".host.log").open("ab") as log:
            # It returns as soon as the host is on its own, with init for a parent.
            subprocess.run(
                [sys.executable, "-m", "batch_orchestration.hosting.host"],
                stdin=theirs.fileno(),
                stdout=log,
                stderr=log,
                start_new_session=True,
                check=False,
            )
        lease = HostConnection(ours)
        try:
            state = lease.ask(order, seconds=HOST_START_SECONDS)
        except HostGone as error:
            lease.close()
            raise EngineStartFailed(f"{error}; its log is {log.name}") from error
        if state.ended is not None:
            lease.close()
            raise EngineStartFailed(state.ended)
        self._lease, self._state, self._exit = lease, state, None

    def _ask(self, ask: Ask, *, seconds: float = ANSWER_SECONDS) -> HostState | None:
        """Ask the host; None, and no lease any more, if it is gone."""
        with self._lock:
            if self._lease is None:
                return None
            try:
                self._state = self._lease.ask(ask, seconds=seconds)
            except HostGone as error:
                self._exit = f"was lost: {error}"
                self.release()
                return None
            return self._state


def device_of(settings: Settings) -> str:
    """Return the device that engines run on; the kind of the engine if it is not vLLM."""
    return str(settings.device if settings.engine is EngineKind.VLLM else settings.engine)


def _fingerprint(model: str) -> list[tuple[str, int, int]]:
    """Return name, size and time of each file of a model's folder: others make another engine."""
    folder = Path(model).expanduser()
    if not model or not folder.is_dir():
        return []
    files = ((path, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return [(path.name, stats.st_size, stats.st_mtime_ns) for path, stats in files]


def hosted_process(
    settings: Settings, fallback: MemoryFallback, *, log_path: Path
) -> HostedProcess | None:
    """Return the process of the engine of these settings; None if engines end with their runs."""
    if not settings.engine_keep_alive:
        return None
    configured = {
        "args": flags_of(settings.engine_args),
        "served_model_name": settings.served_model_name,
        "env": settings_hash(settings.engine_environment()),  # It may hold secrets.
        "version": __version__,
        "model_files": _fingerprint(settings.model),
    }

    def spec() -> EngineSpec:
        return EngineSpec(
            kind=str(settings.engine),
            model=settings.model,
            device=device_of(settings),
            configured=configured,
            memory_level=fallback.flags,
        )

    return HostedProcess(
        name=f"the {settings.engine} engine",
        log_path=log_path,
        folder=DataFolder(settings.data_dir),
        spec=spec,
        keep_alive_seconds=settings.engine_keep_alive,
    )
