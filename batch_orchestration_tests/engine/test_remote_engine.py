"""An engine that somebody else runs keeps the contract, goes away, and comes back."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_orchestration.core.errors import EngineDied, EngineRefusesUs, EngineStartFailed
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode
from batch_orchestration.engines.access import is_doubtful
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.engines.openai_server import OpenAIServerEngine, ServerOptions
from batch_orchestration_tests.support.engine_contract import (
    CHAT,
    CONTEXT_TOKENS,
    EngineContract,
    ask,
    ask_and_catch,
    chat,
)
from batch_orchestration_tests.support.raw_server import free_port

KEY = "open-sesame"


class RemoteServer:
    """A simulated server that the engine under test knows only by address."""

    def __init__(self, control_path: Path) -> None:
        self.port = free_port()
        self.control_path = control_path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        module = "batch_orchestration.engines.simulated"
        command = [sys.executable, "-m", module, "--port", str(self.port)]
        command += ["--context-tokens", str(CONTEXT_TOKENS), "--control", str(self.control_path)]
        env = {**os.environ, "SIMULATED_ENGINE_API_KEY": KEY}
        self._process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def engine(self, api_key: str = KEY, connections: int = 100) -> OpenAIServerEngine:
        return OpenAIServerEngine(
            f"http://127.0.0.1:{self.port}/v1",
            api_key=api_key,
            options=ServerOptions(
                timeout_seconds=2.0,
                start_timeout_seconds=30.0,
                connections=connections,
                lost_after_seconds=1.0,
            ),
        )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RemoteServer]:
    server = RemoteServer(tmp_path / "control.json")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def engine(server: RemoteServer) -> OpenAIServerEngine:
    engine = server.engine()
    asyncio.run(engine.start())
    return engine


class TestContract(EngineContract):
    pass


def test_the_identity_says_what_runs_there(engine: OpenAIServerEngine) -> None:
    identity = asyncio.run(engine.start())

    assert identity.kind == "remote"
    assert identity.version.startswith("simulated ")
    assert identity.models == ("simulated-model",)


def test_starting_waits_for_a_server_that_is_not_up_yet(tmp_path: Path) -> None:
    server = RemoteServer(tmp_path / "control.json")

    async def start_late() -> None:
        start = asyncio.create_task(server.engine().start())
        await asyncio.sleep(0.5)
        assert not start.done()
        server.start()
        await start

    try:
        asyncio.run(start_late())
    finally:
        server.kill()


def test_a_server_that_never_answers_fails_the_start_within_its_limit() -> None:
    options = ServerOptions(start_timeout_seconds=0.5)
    engine = OpenAIServerEngine(f"http://127.0.0.1:{free_port()}", options=options)
    began = time.monotonic()

    with pytest.raises(EngineStartFailed, match=r"did not answer in 0\.5 s"):
        asyncio.run(engine.start())

    assert time.monotonic() - began < 10


def test_a_wrong_key_is_no_engine_that_does_not_start(server: RemoteServer) -> None:
    with pytest.raises(EngineRefusesUs, match="HTTP 401: Unauthorized"):
        asyncio.run(server.engine(api_key="wrong").start())


def test_a_key_that_is_refused_later_makes_us_doubt_the_gate(
    engine: OpenAIServerEngine, server: RemoteServer
) -> None:
    asyncio.run(engine.start())

    [outcome] = ask_and_catch(server.engine(api_key="revoked"), chat("Hello."))

    assert isinstance(outcome, Failure)
    assert is_doubtful(outcome)


def test_a_lost_connection_to_a_living_server_is_the_requests_failure(
    engine: OpenAIServerEngine,
) -> None:
    dropped, answered = ask(engine, chat("Hello.", simulate={"drop": True}), chat("Hello."))

    assert isinstance(dropped, Failure)
    assert dropped.code == FailureCode.CONNECTION_LOST
    assert dropped.retryable
    assert isinstance(answered, Completion)


def test_a_server_tells_its_figures_while_every_connection_hangs(
    engine: OpenAIServerEngine, server: RemoteServer
) -> None:
    """Waiting for a free connection, the question would go unanswered: as if by a dead server."""
    narrow = server.engine(connections=1)

    async def ask_meanwhile() -> EngineMetrics | None:
        body = chat("Hang.", simulate={"hang": True})
        call = asyncio.create_task(narrow.answer(CHAT, body, request_id="hanging"))
        await asyncio.sleep(0.2)
        figures = await asyncio.wait_for(narrow.measure(), timeout=1.0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await narrow.disconnect()
        return figures

    figures = asyncio.run(ask_meanwhile())
    assert figures is not None
    assert figures.running == 1


def test_a_server_that_goes_away_is_dead_for_all_in_flight_and_can_come_back(
    engine: OpenAIServerEngine, server: RemoteServer
) -> None:
    slow = [chat(f"Wait {number}.", simulate={"latency_seconds": 1.5}) for number in range(5)]
    killer = chat("Die.", simulate={"die": True})

    lost = ask_and_catch(engine, *slow, killer)
    server.kill()
    server.start()
    asyncio.run(engine.start())
    [answered] = ask(engine, chat("Hello."))

    assert all(isinstance(outcome, EngineDied) for outcome in lost)
    assert "gave no sign of life for 1 s" in str(lost[0])
    assert isinstance(answered, Completion)


def test_a_server_whose_health_fails_is_dead_after_a_while(
    engine: OpenAIServerEngine, server: RemoteServer
) -> None:
    server.control_path.write_text('{"unhealthy": true}')

    [outcome] = ask_and_catch(engine, chat("Hello.", simulate={"status": 500}))

    assert isinstance(outcome, EngineDied)


def test_stopping_leaves_the_server_running(
    engine: OpenAIServerEngine, server: RemoteServer
) -> None:
    engine.stop()
    engine.stop()

    asyncio.run(engine.start())
    [outcome] = ask(engine, chat("Hello."))

    assert isinstance(outcome, Completion)
