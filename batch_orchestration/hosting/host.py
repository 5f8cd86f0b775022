"""An engine host: owns one engine's server from its start to its end, across the runs that use it.

`python -m batch_orchestration.hosting.host` reads its order from standard input, a Unix socket,
which is also the first lease. The server is its child and ends with it, however it ends.

The host ends the server when nothing has used it for the keep-alive time; at once when it is idle
and a device is fenced or a person wants the GPU back; and on request. Then it ends itself.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec
from filelock import Timeout

from batch_orchestration.core.errors import EngineError, EngineStartFailed, StorageError
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.engines.memory_level_file import MemoryLevelFile
from batch_orchestration.engines.processes import sockets
from batch_orchestration.engines.processes.process import STOPPED, EngineProcess
from batch_orchestration.engines.processes.records import identify
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.sharing import keep_from_others
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.gpu.fences import read_fences
from batch_orchestration.hosting.records import (
    LOCK_SECONDS,
    Ask,
    HostOrder,
    HostRecord,
    HostState,
    hosts_lock,
)

logger = logging.getLogger(__name__)
#: Between two looks at the server and at the reasons to end it.
LOOK_SECONDS = 0.25
#: Between two records of the server's processes; a scan of /proc takes milliseconds.
MEMBERS_SECONDS = 2.0
#: Longest message: an order holds a command and an environment.
LONGEST_LINE = 2**20


class EngineHost:
    """Serves leases of one engine, and ends it when nothing uses it any more."""

    def __init__(self, order: HostOrder) -> None:
        self._order = order
        self._folder = DataFolder(Path(order.data_dir))
        self._process = EngineProcess(
            name=f"{order.spec.kind} engine",
            log_path=Path(order.log_path),
            record_path=Path(order.record_path),
        )
        self._ended: str | None = None
        self._info: EngineInfo | None = None
        self._leases = 0
        self._idle_since = time.monotonic()
        #: Messages that are being answered.
        self._asked = 0
        self._over = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Start the server, and return once it has ended and nothing uses it."""
        control = Path(self._order.control)
        sockets.make_private_folder(control)
        server = await asyncio.start_unix_server(
            self._converse, control, limit=LONGEST_LINE, backlog=sockets.BACKLOG
        )
        try:
            self._register()
            self._spawn()
            first = asyncio.create_task(self._converse(reader, writer, is_lease=True))
            await self._watch()
            await asyncio.to_thread(self._process.stop)
            while self._asked:
                await asyncio.sleep(LOOK_SECONDS / 10)
            first.cancel()
        finally:
            server.close()
            try:
                self._process.stop()
            finally:
                Path(self._order.host_path).unlink(missing_ok=True)
                sockets.remove_socket(control)

    def end(self) -> None:
        """End the server and the host, whoever uses them."""
        self._over.set()

    def _register(self) -> None:
        host = identify(os.getpid())
        assert host is not None  # It is this process.
        record = HostRecord(
            host=host, control=self._order.control, spec=self._order.spec, started_at=time.time()
        )
        StateFile(Path(self._order.host_path), HostRecord).write(record)

    def _spawn(self) -> None:
        try:
            self._process.spawn(
                self._order.command, self._order.env, socket=Path(self._order.socket)
            )
        except EngineStartFailed as error:
            self._ended = str(error)

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_lease: bool = False
    ) -> None:
        """Answer one connection until it ends; it is a lease once it has asked for one."""
        self._leases += is_lease
        try:
            if is_lease:  # The order itself, which has been read.
                await self._answer(writer)
            while line := await reader.readline():
                ask = msgspec.json.decode(line, type=Ask)
                if ask.what == "lease" and not is_lease:
                    is_lease = True
                    self._leases += 1
                self._asked += 1
                try:
                    await self._obey(ask)
                    await self._answer(writer)
                finally:
                    self._asked -= 1
        except (OSError, ValueError) as error:  # It is gone, or says nothing that can be read.
            logger.info("a connection ended: %s", error)
        except asyncio.CancelledError:
            return  # The host ends; asyncio would log the cancellation as an error.
        finally:
            if is_lease:
                self._leases -= 1
                self._idle_since = time.monotonic()
            writer.close()

    async def _obey(self, ask: Ask) -> None:
        self._info = ask.info or self._info
        if ask.what == "stop" or (ask.what == "stop idle" and not self._leases):
            await self._stop_server(f"{STOPPED} ({ask.what})")

    async def _answer(self, writer: asyncio.StreamWriter) -> None:
        state = HostState(
            pid=self._process.pid,
            socket=self._order.socket,
            log_path=self._order.log_path,
            log_start=self._process.log_start,
            ended=await self._exit_reason(),
            info=self._info,
            leases=self._leases,
            idle_seconds=None if self._leases else time.monotonic() - self._idle_since,
        )
        writer.write(msgspec.json.encode(state) + b"\n")
        await writer.drain()

    async def _exit_reason(self) -> str | None:
        # In a thread, because ending the server holds the lock of its process.
        return self._ended or await asyncio.to_thread(self._process.exit_reason)

    async def _stop_server(self, why: str) -> None:
        logger.info("the engine %s", why)
        # First, so that whoever asks meanwhile is answered at once.
        self._ended = await self._exit_reason() or why
        try:
            await asyncio.to_thread(self._process.stop)
        except EngineError:
            logger.exception("the engine cannot be ended")

    async def _watch(self) -> None:
        noted_at = 0.0
        while not self._over.is_set():
            if time.monotonic() - noted_at >= MEMBERS_SECONDS:
                noted_at = time.monotonic()
                try:
                    await asyncio.to_thread(self._process.note_members)
                except OSError as error:  # A full disk, say; the next attempt is soon.
                    logger.warning("the processes of the engine cannot be recorded: %s", error)
            if not self._leases:
                if await self._exit_reason() is not None:
                    return
                why = self._reason_to_end()
                if why is not None and await self._end_idle(why):
                    return
            try:
                await asyncio.wait_for(self._over.wait(), LOOK_SECONDS)
            except TimeoutError:
                continue

    def _reason_to_end(self) -> str | None:
        """Return why an idle engine is ended now; None if it stays warm."""
        idle = time.monotonic() - self._idle_since
        if idle >= self._order.keep_alive_seconds:
            return f"was idle for {idle:.0f} s"
        if not Path(self._order.host_path).exists():
            return "is not recorded any more"
        try:
            if read_fences(self._folder):
                return "was idle when a device was fenced"
            pause = StateFile(self._folder.paused, _Pause).read_if_sound()
        except StorageError as error:
            return f"was idle when fences or the pause could not be read ({error})"
        if pause is not None and pause.release_gpu:
            return "was idle when the queue was paused to release the GPU"
        return None

    async def _end_idle(self, why: str) -> bool:
        """End the server unless a run attaches just now; return whether it was ended."""
        overdue = time.monotonic() - self._idle_since - self._order.keep_alive_seconds
        lock = hosts_lock(self._folder)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if overdue < LOCK_SECONDS:
                return False  # A run is attaching, or waits for the gate: look again.
            logger.warning("somebody has held %s for %.0f s", lock.lock_file, overdue)
        except OSError as error:  # Without the lock, no run can attach either.
            logger.warning("%s cannot be locked: %s", lock.lock_file, error)
        try:
            if self._leases:
                return False
            await self._stop_server(why)
            self._let_memory_level_rise()
            return True
        finally:
            lock.release()

    def _let_memory_level_rise(self) -> None:
        """Let the next start try more memory: whatever caused the shortage may be gone."""
        spec = self._order.spec
        if spec.memory_level:
            levels = MemoryLevelFile(self._folder.memory_levels)
            levels.let_retry(spec.model or spec.kind, spec.device)


class _Pause(msgspec.Struct):
    """The part of a pause of the queue that concerns engines; see `queue.entries.Pause`."""

    release_gpu: bool = False


async def _run(first: socket.socket) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=first, limit=LONGEST_LINE)
    host = EngineHost(msgspec.json.decode(await reader.readline(), type=HostOrder))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, host.end)
    await host.serve(reader, writer)


def main() -> None:
    """Host one engine, as ordered on standard input, as a child of init."""
    if os.fork():
        os._exit(0)
    keep_from_others()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    first = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    with Path(os.devnull).open() as nothing:  # No process below may keep the lease open.
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    asyncio.run(_run(first))


if __name__ == "__main__":
    main()
