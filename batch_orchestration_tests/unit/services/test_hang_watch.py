"""The watch over an engine, on a clock of its own: stuck, slow, and frozen together with us."""

import asyncio

import pytest

from batch_orchestration.domain.engine_figures import EngineFigures
from batch_orchestration.domain.errors import EngineDied
from batch_orchestration.services.hang_watch import HangWatch
from batch_orchestration_tests.scripted_engine import ScriptedEngine

LIMIT = 100.0


class Watched:
    """A watch that looks once a second at an engine which has requests and tells its tokens."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)
        self.watch = HangWatch(ScriptedEngine(), floor_seconds=LIMIT)
        self.watch.begin()

    async def look(self, *, tokens, after=1.0, in_flight=4):
        self.now += after
        await self.watch.judge(EngineFigures(generation_tokens=tokens), in_flight=in_flight)

    async def look_for(self, seconds, *, tokens):
        for _ in range(int(seconds)):
            await self.look(tokens=tokens)


def run(scenario, monkeypatch):
    async def watched():
        await scenario(Watched(monkeypatch))

    asyncio.run(watched())


def test_an_engine_without_a_token_for_the_limit_is_stuck(monkeypatch):
    async def scenario(engine):
        await engine.look_for(LIMIT, tokens=0)
        with pytest.raises(EngineDied, match="no token for"):
            await engine.look_for(2, tokens=0)

    run(scenario, monkeypatch)


def test_an_engine_that_counts_tokens_is_slow_at_most(monkeypatch):
    async def scenario(engine):
        for tokens in range(20):
            await engine.look_for(LIMIT - 2, tokens=tokens)

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
