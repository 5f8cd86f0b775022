"""The client of an OpenAI-compatible server, wherever the server runs."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import aiohttp
import msgspec

from batch_orchestration.core.errors import EngineDied, EngineRefusesUs, EngineStartFailed
from batch_orchestration.core.foreign_json import check_depth
from batch_orchestration.core.outcomes import Failure, FailureCode, Outcome
from batch_orchestration.engines.access import MODELS_PAGE, first_line, is_doubtful
from batch_orchestration.engines.answers import ABORTED, read_answer, whole_number
from batch_orchestration.engines.base import Engine, EngineInfo
from batch_orchestration.engines.memory_fallback import MemoryFallback, MemoryLevel
from batch_orchestration.engines.metrics import EngineMetrics, parse_metrics
from batch_orchestration.engines.processes.sockets import most_connections
from batch_orchestration.engines.reading import (
    ACCEPT_ENCODING,
    AnswerBudget,
    Unreadable,
    read_body,
    require_success,
)
from batch_orchestration.files.regular import NO_DESCRIPTOR

logger = logging.getLogger(__name__)

#: Below uvicorn's 5 s, so that this side closes an idle connection first. Otherwise a request is
#: sometimes sent into a connection that the server is just closing.
KEEP_ALIVE_SECONDS = 4.0
CONNECT_SECONDS = 30.0
#: A server busy with tokenization answers /health late, but it answers.
HEALTH_SECONDS = 10.0
HEALTH_POLL_SECONDS = 0.2
#: Between attempts to connect while no file descriptor is free.
DESCRIPTOR_POLL_SECONDS = 0.5
#: Limit of a page that the server serves about itself.
PAGE_BYTES = 4 * 2**20
#: The version is stored with each result.
VERSION_MAX_LENGTH = 200

_T = TypeVar("_T")


class _Model(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    owned_by: str | None = None
    max_model_len: msgspec.Raw = msgspec.Raw(b"null")


class _Models(msgspec.Struct):
    data: list[_Model]


class _Version(msgspec.Struct):
    version: str


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a server is used, wherever it runs.

    Attributes:
        timeout_seconds: For one attempt of one request, including the wait for a connection.
        start_timeout_seconds: Until the server must be ready.
        connections: Maximum number of connections; further requests wait for one.
        lost_after_seconds: After a lost request or a 5xx, a server that does not answer for this
            long counts as dead.
        answer_bytes: Limit of one decompressed answer; a longer one is a failure and is read no
            further.
        all_answers_bytes: Limit of all answers being read; beyond it, reading waits.
    """

    timeout_seconds: float = 1800.0
    start_timeout_seconds: float = 900.0
    connections: int = 1024
    lost_after_seconds: float = 30.0
    answer_bytes: int = 64 * 2**20
    all_answers_bytes: int = 256 * 2**20


DEFAULT_OPTIONS = ServerOptions()


class NoAnswer(Exception):
    """The server cannot be reached, or does not answer in time."""


@dataclass
class _Connection:
    """The resources of one event loop.

    Queries about the server have connections of their own. Otherwise they would wait behind
    requests that hang, and a living server would pass for dead.
    """

    requests: aiohttp.ClientSession
    queries: aiohttp.ClientSession
    budget: AnswerBudget
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    probing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def close(self) -> None:
        await self.requests.close()
        await self.queries.close()


class OpenAIServerEngine(Engine):
    """An engine behind an OpenAI-compatible server that is not started here.

    Redirects are not followed: prompts and key are for this server alone.

    Args:
        base_url: With or without a trailing `/v1`.
        socket: Unix socket at which the server listens; overrides the host in `base_url`.
        kind: See `EngineInfo`.
        gone: Returns why the server is certainly gone; None if that is not known. Called before
            and during the wait.
    """

    def __init__(
        self,
        base_url: str,
        *,
        socket: Path | None = None,
        api_key: str = "",
        kind: str = "remote",
        options: ServerOptions = DEFAULT_OPTIONS,
        gone: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._socket = socket
        self.name = self.base_url if socket is None else f"unix:{socket}"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._kind = kind
        self._options = options
        self._gone = gone
        self._connection: _Connection | None = None
        self.info: EngineInfo | None = None
        #: Its memory is not ours to set.
        self.fallback = MemoryFallback(MemoryLevel())
        self._alive_at = 0.0
        #: Why the server counts as dead; None if it does not.
        self.died: str | None = None

    async def start(self) -> EngineInfo:
        """Wait until the server answers; return its description. See `Engine.start`."""
        if self.info is None or not await self.is_well():
            began = time.monotonic()
            async with self._open_session() as session:
                await self._wait_until_healthy(session)
                self.info = await self._identify(session, began)
            self.died = None
        return self.info

    async def is_well(self) -> bool:
        """Return whether the server answers its health check and is not known to be dead."""
        if self.died is not None or self._gone() is not None:
            return False
        async with self._open_session() as session:
            return await self._healthy(session) and self._gone() is None

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        """Post one request and return its outcome. See `Engine.answer`."""
        self._raise_if_dead()
        outcome = await self._post(endpoint, body, request_id)
        if isinstance(outcome, Failure):
            if outcome.status is None or outcome.status >= 500:
                await self._make_sure_it_lives(outcome)
        elif outcome.finish_reason == ABORTED:
            # Only a terminating engine aborts requests; the answer is partial.
            self.died = self.died or f"{self.name} aborted its requests in flight"
            self._raise_if_dead()
        return outcome

    async def measure(self) -> EngineMetrics | None:
        """Return the metrics on the server's page. See `Engine.measure`."""
        return await self._measure(self._connected().queries)

    async def disconnect(self) -> None:
        """Close the connections of the running event loop."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.loop is asyncio.get_running_loop():
            await connection.close()

    def stop(self) -> None:
        """Leave the server running, since it was not started here; `start` identifies it again."""
        self.died = self.died or f"{self.name} was given up"

    def release(self) -> None:
        """Do nothing: the server was not started here."""

    async def _healthy(self, session: aiohttp.ClientSession) -> bool:
        # Any answer below 500 will do, even that the page does not exist.
        try:
            async with self._get(session, "/health") as response:
                return response.status < 500
        except NoAnswer:
            return False

    @contextlib.asynccontextmanager
    async def _get(
        self, session: aiohttp.ClientSession, page: str, *, seconds: float = HEALTH_SECONDS
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Open one of the server's pages about itself.

        Raises:
            NoAnswer: The server cannot be reached, or the page was not read in time.
        """
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with session.get(
                self.base_url + page, allow_redirects=False, timeout=timeout
            ) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NoAnswer(repr(error)) from error

    def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=self._connector(),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                **self._headers,
                "Content-Type": "application/json",
                "Accept-Encoding": ACCEPT_ENCODING,
            },
            # A small piece may decompress to more than memory holds: `read_body` bounds it.
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(
                total=self._options.timeout_seconds, sock_connect=CONNECT_SECONDS
            ),
        )

    def _connector(self) -> aiohttp.BaseConnector:
        limit, keep_alive = self._options.connections, KEEP_ALIVE_SECONDS
        if self._socket is None:
            return aiohttp.TCPConnector(limit=limit, keepalive_timeout=keep_alive)
        limit = min(limit, most_connections())
        return aiohttp.UnixConnector(str(self._socket), limit=limit, keepalive_timeout=keep_alive)

    def _connected(self) -> _Connection:
        if self._connection is None or self._connection.loop is not asyncio.get_running_loop():
            budget = AnswerBudget(self._options.all_answers_bytes)
            self._connection = _Connection(self._open_session(), self._open_session(), budget)
        return self._connection

    async def _post(self, endpoint: str, body: bytes, request_id: str) -> Outcome:
        began, connection = time.perf_counter(), self._connected()
        timeout_seconds = self._options.timeout_seconds
        with connection.budget.reader() as take:
            try:
                async with (
                    # Includes the waits for memory and for a descriptor.
                    asyncio.timeout(timeout_seconds),
                    contextlib.AsyncExitStack() as stack,
                ):
                    response = await self._open(stack, connection, endpoint, body, request_id)
                    content, fault = await self._content(response, take)
            except aiohttp.ClientError as error:  # first, since some of them are TimeoutErrors
                code, message = FailureCode.CONNECTION_LOST, f"{type(error).__name__}: {error}"
            except TimeoutError:
                code, message = FailureCode.TIMEOUT, f"no answer in {timeout_seconds:g} s"
            else:
                seconds = time.perf_counter() - began
                status = response.status
                outcome = read_answer(endpoint, status, response.headers, content, seconds)
                if fault is None:
                    return outcome
                fault = f"HTTP status {status}, but the answer cannot be read: {fault}"
                return msgspec.structs.replace(outcome, message=fault)
        return Failure(code=code, message=message, latency_seconds=time.perf_counter() - began)

    async def _open(
        self,
        stack: contextlib.AsyncExitStack,
        connection: _Connection,
        endpoint: str,
        body: bytes,
        request_id: str,
    ) -> aiohttp.ClientResponse:
        """Send a request and return its response before the body; the stack closes it.

        While this machine has no free file descriptor, the call waits: that is unrelated to the
        server and costs no attempt.
        """
        while True:
            try:
                return await stack.enter_async_context(
                    connection.requests.post(
                        self.base_url + endpoint,
                        data=body,
                        headers={"X-Request-Id": request_id},
                        allow_redirects=False,
                    )
                )
            except aiohttp.ClientConnectorError as error:
                if error.errno not in NO_DESCRIPTOR:
                    raise
                logger.debug("no descriptor for a connection: %s", error)
                await asyncio.sleep(DESCRIPTOR_POLL_SECONDS)

    async def _content(
        self, response: aiohttp.ClientResponse, take: Callable[[int], Awaitable[None]]
    ) -> tuple[bytes, str | None]:
        """Return the body, or an empty body and why it cannot be read."""
        most = self._options.answer_bytes
        try:
            return await read_body(response, most_bytes=most, take=take), None
        except Unreadable as fault:
            return b"", str(fault)

    async def _make_sure_it_lives(self, failure: Failure) -> None:
        """Require a sign of life that is newer than the failure; one query serves all requests.

        Raises:
            EngineDied: The server gave none.
        """
        failed_at = time.monotonic()
        connection = self._connected()
        async with connection.probing:
            self._raise_if_dead()
            if self._alive_at >= failed_at:
                return
            asked_at = time.monotonic()
            reason = await self._why_dead(connection.queries)
            if reason is None:
                self._alive_at = asked_at
                return
            self.died = f"{reason}; noticed by a request that failed: {failure.message}"
        self._raise_if_dead()

    async def _why_dead(self, session: aiohttp.ClientSession) -> str | None:
        seconds = self._options.lost_after_seconds
        deadline = time.monotonic() + seconds
        while (reason := self._gone()) is None:
            if await self._healthy(session):
                return self._gone()
            if time.monotonic() > deadline:
                return f"{self.name} gave no sign of life for {seconds:g} s"
            await asyncio.sleep(HEALTH_POLL_SECONDS)
        return reason

    def _raise_if_dead(self) -> None:
        if self.died is not None:
            raise EngineDied(self.died)

    async def _wait_until_healthy(self, session: aiohttp.ClientSession) -> None:
        seconds = self._options.start_timeout_seconds
        deadline = time.monotonic() + seconds
        waiting = False
        while not await self._healthy(session):
            if (reason := self._gone()) is not None:
                raise EngineStartFailed(reason)
            if time.monotonic() > deadline:
                raise EngineStartFailed(f"{self.name} did not answer in {seconds:g} s")
            if not waiting:
                waiting = True
                logger.info("waiting for %s, which does not answer yet", self.name)
            await asyncio.sleep(HEALTH_POLL_SECONDS)

    async def _identify(self, session: aiohttp.ClientSession, began: float) -> EngineInfo:
        models = await self._ask(session, MODELS_PAGE, _Models)
        if not models.data:
            raise EngineStartFailed(f"{self.name} serves no model")
        version = "unknown"
        with contextlib.suppress(EngineStartFailed, EngineRefusesUs):
            number = (await self._ask(session, "/version", _Version)).version
            version = f"{models.data[0].owned_by or ''} {number}".strip()[:VERSION_MAX_LENGTH]
        metrics = await self._measure(session)
        return EngineInfo(
            kind=self._kind,
            version=version,
            models=tuple(model.id for model in models.data),
            # A server without a limit reports 0.
            max_model_len=whole_number(models.data[0].max_model_len) or None,
            kv_cache_tokens=None if metrics is None else metrics.kv_cache_tokens,
            start_seconds=round(time.monotonic() - began, 3),
        )

    async def _measure(self, session: aiohttp.ClientSession) -> EngineMetrics | None:
        try:
            async with self._get(session, "/metrics") as response:
                # A server without this page may send anything instead.
                page = await read_body(response, most_bytes=PAGE_BYTES)
        except NoAnswer:
            return None
        except Unreadable:
            return EngineMetrics()
        return parse_metrics(page.decode(errors="replace"))

    async def _ask(self, session: aiohttp.ClientSession, page: str, kind: type[_T]) -> _T:
        """Read one of the server's pages about itself.

        Raises:
            EngineRefusesUs: Access to the page is refused.
            EngineStartFailed: The page is missing or malformed.
        """
        url = self.base_url + page
        try:
            async with self._get(session, page, seconds=CONNECT_SECONDS) as response:
                content = await read_body(response, most_bytes=PAGE_BYTES)
                if not response.ok or response.status >= 300:
                    answer = read_answer(page, response.status, response.headers, content, 0.0)
                    _raise_if_refused(url, page, answer)
                require_success(response)
            check_depth(content)
            return msgspec.json.decode(content, type=kind)
        except (NoAnswer, Unreadable, ValueError) as error:
            raise EngineStartFailed(f"{url} cannot be used: {error}") from error


def _raise_if_refused(url: str, page: str, answer: Outcome) -> None:
    if isinstance(answer, Failure) and is_doubtful(answer):
        line = first_line(answer.message)
        raise EngineRefusesUs(
            f"the engine refuses access: {url} answers HTTP {answer.status}: {line}",
            page=page,
            status=answer.status,
            line=line,
        )
