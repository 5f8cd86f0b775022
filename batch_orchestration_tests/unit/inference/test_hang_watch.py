"""The watch over an engine, on a clock of its own: stuck, slow, and frozen together with us."""

import asyncio

import pytest

from batch_orchestration.core.errors import EngineDied
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.inference.faults.hang_watch import HangWatch
from batch_orchestration.workers.run_status import RunStatus
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine

LIMIT = 100.0


class Watched:
    """A watch that looks once a second at an engine which has requests and tells its tokens."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)
        self.status = RunStatus(in_flight=4)
        self.watch = HangWatch(ScriptedEngine(), floor_seconds=LIMIT, status=self.status)
        self.watch.begin()

    async def look(self, *, tokens, kv_usage=0.1, after=1.0):
        self.now += after
        figures = EngineMetrics(generation_tokens=tokens, kv_usage=kv_usage)
        await self.watch.judge(figures)

    async def look_for(self, seconds, *, tokens, kv_usage=0.1):
        for _ in range(int(seconds)):
            await self.look(tokens=tokens, kv_usage=kv_usage)


def run(scenario, monkeypatch):
    async def watched():
        await scenario(Watched(monkeypatch))

    asyncio.run(watched())


def test_an_engine_without_a_token_for_the_limit_is_stuck(monkeypatch):
    async def scenario(engine):
        await engine.look(tokens=0)
        await engine.look_for(LIMIT, tokens=1)
        with pytest.raises(EngineDied, match="no token for"):
            await engine.look_for(2, tokens=1)

    run(scenario, monkeypatch)


def test_an_engine_that_counts_tokens_is_slow_at_most(monkeypatch):
    async def scenario(engine):
        for tokens in range(20):
            await engine.look_for(LIMIT - 2, tokens=tokens)

    run(scenario, monkeypatch)


def test_an_engine_that_reads_a_long_prompt_is_slow_at_most(monkeypatch):
    """The engine counts its tokens when all of it is read; its KV cache fills meanwhile."""

    async def scenario(engine):
        engine.watch.note_progress()
        for chunk in range(20):
            await engine.look_for(LIMIT - 2, tokens=7, kv_usage=0.1 + chunk / 100)
        with pytest.raises(EngineDied):
            await engine.look_for(6 * LIMIT, tokens=7, kv_usage=0.9)

    run(scenario, monkeypatch)


def test_the_first_token_of_an_engine_may_take_longer_and_teaches_no_patience(monkeypatch):
    async def scenario(engine):
        for _ in range(2):
            engine.watch.note_start()
            await engine.look_for(2.5 * LIMIT, tokens=0)
            await engine.look(tokens=1)
            assert engine.watch.limit_seconds == LIMIT
        engine.watch.note_start()
        with pytest.raises(EngineDied):
            await engine.look_for(3.1 * LIMIT, tokens=0)

    run(scenario, monkeypatch)


def test_an_engine_is_not_judged_by_time_in_which_we_were_frozen_too(monkeypatch):
    """Nor does a night in the refrigerator make the watch patient for five nights."""

    async def scenario(engine):
        await engine.look_for(10, tokens=1)
        await engine.look(tokens=1, after=8 * 3600)
        await engine.look(tokens=2)

        assert engine.watch.limit_seconds < 3 * LIMIT
        with pytest.raises(EngineDied):
            await engine.look_for(3 * LIMIT, tokens=2)

    run(scenario, monkeypatch)
