"""An engine that does not get ready says why, in time, and leaves nothing behind."""

import asyncio
import stat
import threading
import time
from pathlib import Path

import pytest

from batch_orchestration.core.errors import EngineStartFailed
from batch_orchestration.engines.openai_server import ServerOptions
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration_tests.support.engine_processes import tcp_listeners


def test_an_engine_that_exits_while_it_starts_says_why(tmp_path: Path) -> None:
    engine = SimulatedEngine(log_path=tmp_path / "engine.log", startup_error="the model is broken")

    with pytest.raises(EngineStartFailed, match="RuntimeError: the model is broken"):
        asyncio.run(engine.start())

    assert not (tmp_path / "engine.process.json").exists()


def test_an_engine_that_never_gets_ready_fails_within_the_limit(tmp_path: Path) -> None:
    engine = SimulatedEngine(
        log_path=tmp_path / "engine.log",
        startup_seconds=300,
        options=ServerOptions(start_timeout_seconds=1.0),
    )
    began = time.monotonic()

    with pytest.raises(EngineStartFailed, match="was not ready in 1 s"):
        asyncio.run(engine.start())

    assert time.monotonic() - began < 60  # of the 300 that it would have taken
    assert not (tmp_path / "engine.process.json").exists()


def test_an_engine_listens_in_a_folder_of_ours_alone_and_at_no_port(tmp_path: Path) -> None:
    engine = SimulatedEngine(log_path=tmp_path / "engine.log")

    try:
        asyncio.run(engine.start())

        pid, socket = engine.process.pid, engine.process.socket
        assert socket.is_socket()
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert tcp_listeners(pid) == []
    finally:
        engine.stop()

    assert not socket.parent.exists()


def test_an_engine_can_be_stopped_while_it_starts(tmp_path: Path) -> None:
    engine = SimulatedEngine(log_path=tmp_path / "engine.log", startup_seconds=300)
    threading.Timer(0.5, engine.stop).start()

    with pytest.raises(EngineStartFailed, match="was stopped while it started"):
        asyncio.run(engine.start())

    assert not (tmp_path / "engine.process.json").exists()


def test_a_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    engine = SimulatedEngine(log_path=tmp_path / "engine.log", startup_seconds=300)

    async def cancel() -> None:
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0.5)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)

    asyncio.run(cancel())

    assert engine.starts == 1
    assert not (tmp_path / "engine.process.json").exists()
