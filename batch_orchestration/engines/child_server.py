"""An engine whose server is a child process: started, monitored and ended by this process."""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import msgspec

from batch_orchestration.core.errors import EngineDied, EngineStartFailed, Exhaustion
from batch_orchestration.core.outcomes import Completion, Outcome
from batch_orchestration.engines import exhaustion
from batch_orchestration.engines.base import Engine, EngineInfo
from batch_orchestration.engines.memory_fallback import MemoryFallback
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.engines.openai_server import (
    DEFAULT_OPTIONS,
    OpenAIServerEngine,
    ServerOptions,
)
from batch_orchestration.engines.processes import logs
from batch_orchestration.engines.processes.process import (
    STOPPED,
    EngineProcess,
    Launch,
    ServerProcess,
)

logger = logging.getLogger(__name__)

#: A server that takes long to start is polled less often.
POLL_SECONDS, POLL_MAX_SECONDS = 0.05, 0.5
PROGRESS_SECONDS = 10.0
LOG_LINES_IN_ERROR = 30
LAST_LINES = 3
CAUSES = 3
ALL_LINES = 10**9
#: Starts that may be lost to other processes that end the same server meanwhile.
LOST_STARTS = 3


class _EndedByOthers(EngineStartFailed):
    """Another run or a person ended the server while it started."""


class ChildServerEngine(Engine):
    """An engine whose server is a child process.

    Args:
        kind: See `EngineInfo`.
        launch: Returns how to start the server; may raise `EngineStartFailed`.
        fallback: Provides the memory level that `launch` reads.
        log_path: File to which the server's output is appended.
        record_path: File in which its processes are recorded; beside the log by default. Two
            engines at a time need two records.
        process: The server's process if it is not a child of this one, with a log and a record of
            its own.
        before_start: Called in a thread before each start, after remains of an earlier server have
            been ended. If it raises, no server is started and `start` raises the same.
    """

    def __init__(
        self,
        *,
        kind: str,
        launch: Launch,
        fallback: MemoryFallback,
        log_path: Path,
        record_path: Path | None = None,
        process: ServerProcess | None = None,
        before_start: Callable[[], None] = lambda: None,
        options: ServerOptions = DEFAULT_OPTIONS,
    ) -> None:
        self.name = f"the {kind} engine"
        self.info: EngineInfo | None = None
        self._kind = kind
        self._options = options
        self._launch = launch
        self._before_start = before_start
        self.fallback = fallback
        self.process: ServerProcess = process or EngineProcess(
            name=self.name,
            log_path=log_path,
            record_path=record_path or log_path.with_suffix(".process.json"),
        )
        #: How often a server was started; a warm one does not count.
        self.starts = 0
        self._server: OpenAIServerEngine | None = None
        self._stopped = False
        self._life = exhaustion.SignsOfLife(exhaustion.Survived())
        #: The dead server and its exhaustion: one finding for all requests in flight.
        self._examined: tuple[OpenAIServerEngine, Exhaustion | None] | None = None

    async def start(self) -> EngineInfo:
        """Start the server, unless it runs, and wait until it is ready. See `Engine.start`."""
        fits = await asyncio.to_thread(self.fallback.fit)
        # Checked, not remembered: it may have died while no request was in flight to notice it.
        if fits and self.info and self._server and await self._server.is_well():
            return self.info
        self._stopped = False
        await self.disconnect()
        self._server = None
        # A server that is here is dead, stuck, or of another memory level.
        await asyncio.to_thread(self.process.stop)
        for _ in range(LOST_STARTS):
            warm = await asyncio.to_thread(self.process.obtain, self._launch, self._before_start)
            try:
                return await self._become_ready(warm)
            except EngineStartFailed as error:
                if self._stopped or (warm is None and not isinstance(error, _EndedByOthers)):
                    raise
                logger.warning("another server is started, because of this one: %s", error)
        raise EngineStartFailed(f"{self.name} was ended by others {LOST_STARTS} times in a row")

    async def _become_ready(self, warm: EngineInfo | None) -> EngineInfo:
        """Wait until the server answers; return its description."""
        self.starts += warm is None
        began, seconds = time.monotonic(), self._options.start_timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                server = await self._connect()
                info = await server.start()
        except TimeoutError as error:
            self._fail(f"was not ready in {seconds:g} s", error)
        except asyncio.CancelledError:
            # Other runs may wait for the same server.
            self.process.release()
            raise
        except BaseException:
            self.process.stop()
            raise
        self._server = server
        self.info = warm or msgspec.structs.replace(
            info,
            start_seconds=round(time.monotonic() - began, 3),
            max_num_seqs=self.fallback.level.max_num_seqs,
        )
        await asyncio.to_thread(self.process.announce, self.info)
        logger.info("%s is ready after %.1f s", self.name, time.monotonic() - began)
        return self.info

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        """Submit one request to the server. See `Engine.answer`."""
        if self._server is None:
            raise EngineDied(f"{self.name} is not running")
        try:
            outcome = await self._server.answer(endpoint, body, request_id=request_id)
        except EngineDied as death:
            death.exhaustion = self._exhaustion_of(self._server)
            death.deliberate = not self._stopped and self._was_ended_by_others()
            raise
        if isinstance(outcome, Completion):
            self.fallback.note_answer()
            self._life.note_answer(time.monotonic(), self._observe)
        return outcome

    async def measure(self) -> EngineMetrics | None:
        """Return the server's metrics. See `Engine.measure`."""
        return None if self._server is None else await self._server.measure()

    async def disconnect(self) -> None:
        """Close the connections of the running event loop."""
        if self._server is not None:
            await self._server.disconnect()

    def stop(self) -> None:
        """End the server and every process that it started. Idempotent.

        Raises:
            EngineError: A process outlived SIGKILL.
        """
        self._stopped = True
        self.process.stop()

    def release(self) -> None:
        """End this run's use of the server. See `Engine.release`."""
        self._stopped = True
        self.process.release()

    async def _connect(self) -> OpenAIServerEngine:
        """Return the client of the server's process, once the server is ready."""
        self._life = exhaustion.SignsOfLife(self._observe())
        self._require_not_stopped()
        socket = self.process.socket
        logger.info(
            "%s is pid %s at %s; its log is %s",
            self.name,
            self.process.pid,
            socket,
            self.process.log_path,
        )
        server = OpenAIServerEngine(
            "http://localhost",
            socket=socket,
            kind=self._kind,
            options=self._options,
            gone=self._why_gone,
        )
        await self._wait_until_ready(server)
        return server

    async def _wait_until_ready(self, server: OpenAIServerEngine) -> None:
        logged_at = began = time.monotonic()
        while not await server.is_well():
            if (reason := await asyncio.to_thread(self.process.exit_reason)) is not None:
                self._require_not_stopped()
                if reason.startswith(STOPPED):
                    raise _EndedByOthers(f"{self.name} {reason} before it was ready")
                self._fail(f"{reason} before it was ready", None)
            self.process.note_members()
            now = time.monotonic()
            if now - logged_at >= PROGRESS_SECONDS:
                logged_at = now
                line = "".join(self.process.last_log_lines(1))
                logger.info("still starting %s, %.0f s: %s", self.name, now - began, line)
            await asyncio.sleep(min(POLL_MAX_SECONDS, POLL_SECONDS + (now - began) / 20))
        self.process.note_members()

    def _was_ended_by_others(self) -> bool:
        """Whether another run or a person ended the server that we used, too."""
        return (self.process.exit_reason() or "").startswith(STOPPED)

    def _require_not_stopped(self) -> None:
        if self._stopped:
            raise EngineStartFailed(f"{self.name} was stopped while it started")

    def _fail(self, what: str, cause: BaseException | None) -> NoReturn:
        """End the server and raise an error with the causes found in its log."""
        lines, exhausted = self.process.last_log_lines(1000), self._recognise_exhaustion()
        self.process.stop()
        causes = "".join(f"\n  {line}" for line in logs.causes(lines)[:CAUSES])
        tail = "".join(f"\n  {line}" for line in lines[-LOG_LINES_IN_ERROR:])
        raise EngineStartFailed(
            f"{self.name} {what}.{causes}\n"
            f"Last lines of {self.process.log_path}:{tail or ' (empty)'}",
            exhaustion=exhausted,
        ) from cause

    def _exhaustion_of(self, server: OpenAIServerEngine) -> Exhaustion | None:
        if self._examined is None or self._examined[0] is not server:
            self._examined = server, self._recognise_exhaustion()
        return self._examined[1]

    def _observe(self) -> exhaustion.Survived:
        return exhaustion.Survived(self.process.log_size, exhaustion.count_kernel_kills())

    def _recognise_exhaustion(self) -> Exhaustion | None:
        survived = self._life.survived
        return exhaustion.recognise(
            self.process.last_log_lines(
                ALL_LINES, since=survived.log_size, tail_bytes=exhaustion.TAIL_BYTES
            ),
            exit_reason=self.process.exit_reason(),
            before=survived.kills,
            now=exhaustion.count_kernel_kills(),
        )

    def _why_gone(self) -> str | None:
        reason = self.process.exit_reason()
        if reason is None:
            return None
        lines = self.process.last_log_lines(1000)
        last_lines = " | ".join(logs.causes(lines)[-CAUSES:] or lines[-LAST_LINES:])
        return f"{self.name} {reason}; its log ends with: {last_lines}"
