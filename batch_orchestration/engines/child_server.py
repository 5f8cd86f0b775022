"""An engine whose server is a child process: started, monitored and ended by this process."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from batch_orchestration.core.errors import EngineDied, EngineStartFailed, Exhaustion
from batch_orchestration.core.outcomes import Completion, Outcome
from batch_orchestration.engines import exhaustion
from batch_orchestration.engines.base import Engine, EngineInfo
from batch_orchestration.engines.memory_fallback import MemoryFallback
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.engines.openai_server import OpenAIServerEngine
from batch_orchestration.engines.processes import logs
from batch_orchestration.engines.processes.process import EngineProcess
from batch_orchestration.engines.processes.sockets import choose_socket
from batch_orchestration.engines.reading import DEFAULT_LIMITS, AnswerLimits

logger = logging.getLogger(__name__)

#: A server that takes long to start is polled less often.
POLL_SECONDS, POLL_MAX_SECONDS = 0.05, 0.5
PROGRESS_SECONDS = 10.0
LOG_LINES_IN_ERROR = 30
LAST_WORDS = 3
CAUSES = 3
ALL_LINES = 10**9

Launch = Callable[[Path], tuple[Sequence[str], Mapping[str, str | None]]]
"""From Unix socket to command and additional environment; see `child_environment`."""


class ChildServerEngine(Engine):
    """An engine whose server is a child process.

    Args:
        kind: See `EngineInfo`.
        launch: Returns how to start the server; may raise `EngineStartFailed`.
        fallback: Provides the memory level that `launch` reads.
        log_path: File to which the server's output is appended.
        record_path: File in which its processes are recorded; beside the log by default. Two
            engines at a time need two records.
        before_start: Called in a thread before each start, after remains of an earlier server have
            been ended. If it raises, no server is started and `start` raises the same.
        timeout_seconds: For one attempt of one request.
        start_timeout_seconds: Until the server must be ready.
        connections: Maximum number of connections to the server.
    """

    def __init__(
        self,
        *,
        kind: str,
        launch: Launch,
        fallback: MemoryFallback,
        log_path: Path,
        record_path: Path | None = None,
        before_start: Callable[[], None] = lambda: None,
        timeout_seconds: float = 1800.0,
        start_timeout_seconds: float = 900.0,
        connections: int = 1024,
        limits: AnswerLimits = DEFAULT_LIMITS,
    ) -> None:
        self._limits = limits
        self._kind = kind
        self._launch = launch
        self._before_start = before_start
        self.fallback = fallback
        self._process = EngineProcess(
            name=f"{kind} engine",
            log_path=log_path,
            record_path=record_path or log_path.with_suffix(".process.json"),
        )
        self._timeout_seconds = timeout_seconds
        self._start_timeout_seconds = start_timeout_seconds
        self._connections = connections
        self._server: OpenAIServerEngine | None = None
        self._stopped = False
        self._life = exhaustion.SignsOfLife(exhaustion.Survived())
        #: The dead server and its exhaustion: one finding for all requests in flight.
        self._examined: tuple[OpenAIServerEngine, Exhaustion | None] | None = None
        self._figures: dict[str, Any] = {}

    async def start(self) -> EngineInfo:
        """Start the server, unless it runs, and wait until it is ready. See `Engine.start`."""
        server = self._server
        fits = await asyncio.to_thread(self.fallback.fit)
        # Checked, not remembered: it may have died while no request was in flight to notice it.
        if fits and server and await server.is_well():
            return await server.start()
        self._stopped = False
        await self.disconnect()
        self._server = None
        await asyncio.to_thread(self._process.stop)
        await asyncio.to_thread(self._before_start)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._start_timeout_seconds):
                server = await self._start_server()
                identity = await server.start()
        except TimeoutError as error:
            self._fail(f"was not ready in {self._start_timeout_seconds:g} s", error)
        except BaseException:
            self._process.stop()
            raise
        self._server = server
        self._figures |= {
            "start_seconds": round(time.monotonic() - began, 3),
            "max_num_seqs": self.fallback.level.max_num_seqs,
            **server.facts,
        }
        logger.info("%s is ready after %.1f s", self._process.name, time.monotonic() - began)
        return identity

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        """Submit one request to the server. See `Engine.answer`."""
        if self._server is None:
            raise EngineDied(f"{self._process.name} is not running")
        try:
            outcome = await self._server.answer(endpoint, body, request_id=request_id)
        except EngineDied as death:
            death.exhaustion = self._exhaustion_of(self._server)
            raise
        if isinstance(outcome, Completion):
            self.fallback.note_answer()
            self._life.note_answer(time.monotonic(), self._look)
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
        self._process.stop()

    def figures(self) -> dict[str, Any]:
        """Return pid, socket, number of starts, seconds of the latest one, slots, log, facts."""
        return dict(self._figures)

    def last_log_lines(self, count: int) -> list[str]:
        """Return the last lines of the server's log, even after its death."""
        return self._process.last_log_lines(count)

    async def _start_server(self) -> OpenAIServerEngine:
        socket = choose_socket()
        await self._spawn(socket)
        server = OpenAIServerEngine(
            "http://localhost",
            socket=socket,
            kind=self._kind,
            timeout_seconds=self._timeout_seconds,
            connections=self._connections,
            gone=self._why_gone,
            limits=self._limits,
        )
        await self._wait_until_ready(server)
        return server

    async def _spawn(self, socket: Path) -> None:
        command, env = self._launch(socket)
        self._life = exhaustion.SignsOfLife(self._look())
        await asyncio.to_thread(self._process.spawn, command, env, socket=socket)
        if self._stopped:
            raise EngineStartFailed(f"{self._process.name} was stopped while it started")
        self._figures |= {
            "pid": self._process.pid,
            "socket": str(socket),
            "log": str(self._process.log_path),
            "starts": self._figures.get("starts", 0) + 1,
        }
        logger.info(
            "starting %s (pid %s, %s); its log is %s",
            self._process.name,
            self._process.pid,
            socket,
            self._process.log_path,
        )

    async def _wait_until_ready(self, server: OpenAIServerEngine) -> None:
        spoke_at = began = time.monotonic()
        while not await server.is_well():
            self._make_sure_it_runs()
            self._process.note_members()
            now = time.monotonic()
            if now - spoke_at >= PROGRESS_SECONDS:
                spoke_at = now
                self._log_progress(now - began)
            await asyncio.sleep(min(POLL_MAX_SECONDS, POLL_SECONDS + (now - began) / 20))
        self._process.note_members()

    def _make_sure_it_runs(self) -> None:
        reason = self._process.exit_reason()
        if reason is None:
            return
        if self._stopped:
            raise EngineStartFailed(f"{self._process.name} was stopped while it started")
        self._fail(f"{reason} before it was ready", None)

    def _log_progress(self, seconds: float) -> None:
        line = "".join(self.last_log_lines(1))
        logger.info("still starting %s, %.0f s: %s", self._process.name, seconds, line)

    def _fail(self, what: str, cause: BaseException | None) -> NoReturn:
        """End the server and raise an error with the causes found in its log."""
        lines, exhausted = self.last_log_lines(1000), self._recognise_exhaustion()
        self._process.stop()
        said = "".join(f"\n  {line}" for line in logs.causes(lines)[:CAUSES])
        tail = "".join(f"\n  {line}" for line in lines[-LOG_LINES_IN_ERROR:])
        raise EngineStartFailed(
            f"{self._process.name} {what}.{said}\n"
            f"Last lines of {self._process.log_path}:{tail or ' (empty)'}",
            exhaustion=exhausted,
        ) from cause

    def _exhaustion_of(self, server: OpenAIServerEngine) -> Exhaustion | None:
        if self._examined is None or self._examined[0] is not server:
            self._examined = server, self._recognise_exhaustion()
        return self._examined[1]

    def _look(self) -> exhaustion.Survived:
        return exhaustion.Survived(self._process.log_size, exhaustion.count_kernel_kills())

    def _recognise_exhaustion(self) -> Exhaustion | None:
        survived = self._life.survived
        return exhaustion.recognise(
            self._process.last_log_lines(
                ALL_LINES, since=survived.log_size, tail_bytes=exhaustion.TAIL_BYTES
            ),
            exit_reason=self._process.exit_reason(),
            before=survived.kills,
            now=exhaustion.count_kernel_kills(),
        )

    def _why_gone(self) -> str | None:
        reason = self._process.exit_reason()
        if reason is None:
            return None
        lines = self.last_log_lines(1000)
        last_words = " | ".join(logs.causes(lines)[-CAUSES:] or lines[-LAST_WORDS:])
        return f"{self._process.name} {reason}; its last words: {last_words}"
