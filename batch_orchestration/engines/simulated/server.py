"""The simulated engine's server: OpenAI's API, answers made of hashes, faults on request."""

import asyncio
import contextlib
import hashlib
import hmac
import math
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
from aiohttp import web

from batch_orchestration import __version__
from batch_orchestration.engines.answers import ABORTED
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.engines.simulated.answers import (
    FINGERPRINT,
    Faults,
    Refused,
    answer_body,
    digest,
    error_body,
    read_faults,
)
from batch_orchestration.engines.simulated.kv_cache import KvMachine, KvPace
from batch_orchestration.engines.simulated.malformed_answers import KINDS, strange_answer

#: Torch's message, so that it is recognised like a real one.
OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate it all ({} running)"
#: Larger than any line that admission accepts by default.
MAX_BODY_BYTES = 64 * 2**20
#: Reported capacity of the KV cache: more than requests use, in blocks as vLLM's.
KV_CACHE_TOKENS, KV_BLOCK_TOKENS = 2**24, 16
Rate = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Conditions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Conditions of all requests: the control file, read again whenever it changes.

    Attributes:
        latency_seconds: Median time to an answer.
        latency_sigma: Standard deviation of its logarithm: 0 is constant, 1 has a long tail.
        statuses: HTTP status to share of the attempts that are answered with it.
        drops: Share of the attempts whose connection is dropped.
        strange: Kind of strange answer (`simulated.strange.KINDS`) to share of the attempts that
            are answered with it.
        overloaded_above: With more requests at a time, the surplus is answered 429.
        dies_above: With more running requests, the server runs out of memory and dies. Requests
            beyond `max_num_seqs` wait and do not count.
        unhealthy: `/health` answers 503.
        machine: Answers take as long as on an engine with this KV cache, in addition to
            `latency_seconds`; the first machine given stays.
    """

    latency_seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    latency_sigma: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    statuses: dict[int, Rate] = {}
    drops: Rate = 0.0
    strange: dict[str, Rate] = {}
    overloaded_above: int | None = None
    dies_above: int | None = None
    unhealthy: bool = False
    machine: KvMachine | None = None


class SimulatedServer:
    """One server: its models, its conditions, and its requests in progress.

    Args:
        models: Names of the served models.
        context_tokens: Longer requests are refused.
        max_num_seqs: Maximum number of running requests; the others wait.
        api_key: Required below `/v1`, unless empty.
        control_path: See `Conditions`. Attempts at requests with `fail_first` are counted in a file
            beside it (`<name>.attempts`), so that a request that kills the server can succeed after
            a restart.
    """

    def __init__(
        self,
        *,
        models: tuple[str, ...],
        context_tokens: int,
        max_num_seqs: int,
        api_key: str,
        control_path: Path | None,
    ) -> None:
        self._models = models
        self._context_tokens = context_tokens
        self._slots = asyncio.Semaphore(max_num_seqs)
        self._api_key = api_key
        self._control = _ControlFile(control_path)
        self._attempts = _Attempts(
            control_path and control_path.with_name(f"{control_path.name}.attempts")
        )
        self._accepted = 0
        self._running = 0
        self._held_tokens = 0
        self._pace: KvPace | None = None
        self._prompt_tokens = 0
        self._generation_tokens = 0

    def app(self) -> web.Application:
        """Return the web application."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._authenticate])
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._list_models)
        for endpoint in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            app.router.add_post(endpoint, self._answer)
        return app

    @web.middleware
    async def _authenticate(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        sent = request.headers.get("Authorization", "").encode()
        known = hmac.compare_digest(sent, f"Bearer {self._api_key}".encode())
        if request.path.startswith("/v1") and self._api_key and not known:
            return _json({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=503 if self._control.read().unhealthy else 200)

    async def _version(self, _request: web.Request) -> web.Response:
        return _json({"version": __version__, "system_fingerprint": FINGERPRINT})

    async def _metrics(self, _request: web.Request) -> web.Response:
        metrics = self._engine_metrics
        blocks = (metrics.kv_cache_tokens or 0) // KV_BLOCK_TOKENS
        series = {
            "num_requests_running{}": metrics.running,
            "num_requests_waiting{}": metrics.waiting,
            "kv_cache_usage_perc{}": metrics.kv_usage,
            "num_preemptions_total{}": metrics.preemptions,
            "prompt_tokens_total{}": metrics.prompt_tokens,
            "generation_tokens_total{}": metrics.generation_tokens,
            f'cache_config_info{{block_size="{KV_BLOCK_TOKENS}",num_gpu_blocks="{blocks}"}}': 1.0,
        }
        return web.Response(text="".join(f"vllm:{name} {v}\n" for name, v in series.items()))

    @property
    def _engine_metrics(self) -> EngineMetrics:
        pace = self._pace_of(self._control.read())
        if pace is not None:
            return pace.metrics
        return EngineMetrics(
            running=self._running,
            waiting=self._accepted - self._running,
            kv_usage=min(1.0, self._held_tokens / KV_CACHE_TOKENS),
            kv_cache_tokens=KV_CACHE_TOKENS,
            preemptions=0,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
        )

    def _pace_of(self, conditions: Conditions) -> KvPace | None:
        if self._pace is None and conditions.machine is not None:
            self._pace = KvPace(conditions.machine)
        return self._pace

    async def _list_models(self, _request: web.Request) -> web.Response:
        shared = {"object": "model", "owned_by": FINGERPRINT, "max_model_len": self._context_tokens}
        models = [{"id": m, **shared} for m in self._models]
        return _json({"object": "list", "data": models})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        conditions = self._control.read()
        with self._accept():
            surplus = conditions.overloaded_above
            if surplus is not None and self._accepted > surplus:
                return _error(429, "too many requests at a time")
            try:
                return await self._answer_content(request, await request.read(), conditions)
            except Refused as refusal:
                return _error(refusal.status, str(refusal), refusal.code)

    async def _answer_content(
        self, request: web.Request, content: bytes, conditions: Conditions
    ) -> web.StreamResponse:
        body = _decode(content)
        faults = read_faults(body)
        answer = answer_body(
            request.path, body, models=self._models, context_tokens=self._context_tokens
        )
        attempt = self._attempts.count(content, durably=faults.fail_first is not None)
        dice = random.Random(f"{digest(body)} {attempt}")
        usage = answer["usage"]
        async with self._run(usage["total_tokens"]):
            most = conditions.dies_above
            if faults.exhaust_memory or (most is not None and self._running > most):
                _end_at_once(OUT_OF_MEMORY.format(self._running))
            await asyncio.sleep(_latency(dice, faults, conditions))
            if (pace := self._pace_of(conditions)) is not None:
                await pace.compute(
                    prompt_tokens=usage["prompt_tokens"],
                    completion_tokens=usage["completion_tokens"],
                )
            if faults.fail_first is not None and attempt > faults.fail_first:
                faults = Faults()
            faults = _chance(dice, conditions) or faults
            spoilt = await _spoil(request, faults)
        if spoilt is not None:
            return spoilt
        if faults.abort:
            answer["choices"][0]["finish_reason"] = ABORTED
        self._prompt_tokens += usage["prompt_tokens"]
        self._generation_tokens += usage["completion_tokens"]
        # As vLLM does with --enable-request-id-headers.
        echo = {name: request.headers[name] for name in ["X-Request-Id"] if name in request.headers}
        return _json(answer, headers=echo)

    @contextlib.contextmanager
    def _accept(self) -> Iterator[None]:
        self._accepted += 1
        try:
            yield
        finally:
            self._accepted -= 1

    @contextlib.asynccontextmanager
    async def _run(self, tokens: int) -> AsyncIterator[None]:
        async with self._slots:
            self._running += 1
            self._held_tokens += tokens
            try:
                yield
            finally:
                self._running -= 1
                self._held_tokens -= tokens


class _ControlFile:
    """The conditions as last read; an unreadable file leaves them unchanged."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._conditions = Conditions()

    def read(self) -> Conditions:
        if self._path is None:
            return self._conditions
        try:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino)
            if seen != self._seen:
                self._conditions = msgspec.json.decode(self._path.read_bytes(), type=Conditions)
                self._seen = seen
        except FileNotFoundError:
            self._conditions, self._seen = Conditions(), None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            sys.stderr.write(f"{self._path}: {error}\n")
        return self._conditions


class _Attempts:
    """Number of attempts by body; stored on disk if the count must survive the server."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self._counts = Counter(lines)

    def count(self, content: bytes, *, durably: bool) -> int:
        key = hashlib.sha256(content).hexdigest()[:32]
        self._counts[key] += 1
        if durably and self._path is not None:
            # On a full disk, the count lasts until the server ends.
            with contextlib.suppress(OSError), self._path.open("a") as file:
                file.write(f"{key}\n")
        return self._counts[key]


def _latency(dice: random.Random, faults: Faults, conditions: Conditions) -> float:
    if faults.latency_seconds is not None:
        return faults.latency_seconds
    return conditions.latency_seconds * math.exp(conditions.latency_sigma * dice.gauss())


def _chance(dice: random.Random, conditions: Conditions) -> Faults | None:
    """Draw the fault of one attempt; the shares of all faults apply to one draw."""
    throw = dice.random() - conditions.drops
    if throw < 0:
        return Faults(drop=True)
    for status, share in conditions.statuses.items():
        throw -= share
        if throw < 0:
            return Faults(status=status)
    for kind, share in conditions.strange.items():
        throw -= share
        if throw < 0:
            return Faults(strange=kind)
    return None


async def _spoil(request: web.Request, faults: Faults) -> web.StreamResponse | None:
    """Apply the faults; return the response that replaces the answer, if any."""
    if faults.die:
        _end_at_once("asked to die")
    if faults.hang:
        await asyncio.Event().wait()
    if faults.drop and request.transport is not None:
        request.transport.abort()
    if faults.garbage:
        return web.Response(body=b'{"choices": [', content_type="application/json")
    if faults.strange is not None:
        if faults.strange not in KINDS:
            raise Refused(400, f"simulate: {faults.strange} is none of {', '.join(sorted(KINDS))}")
        return strange_answer(faults.strange)
    if faults.status is None:
        return None
    if faults.error is not None:
        response = _json(faults.error, status=faults.status)
    else:
        response = _error(faults.status, f"simulated status {faults.status}")
    if faults.retry_after is not None:
        response.headers["Retry-After"] = str(faults.retry_after)
    return response


def _end_at_once(reason: str) -> NoReturn:
    """Die like a process that the kernel kills: without an answer to the clients."""
    sys.stderr.write(f"simulated death: {reason}\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(1)


def _decode(content: bytes) -> dict[str, Any]:
    try:
        body: dict[str, Any] = msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused(400, f"the body is not a JSON object: {error}") from error
    return body


def _json(
    value: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def _error(status: int, message: str, code: str | None = None) -> web.Response:
    return _json(error_body(status, message, code), status=status)
