"""Asks an engine for its figures, once for everybody who goes by them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.figures import EngineFigures

#: vLLM updates its metrics with every step; the window need not follow faster than this.
POLL_SECONDS = 1.0
#: An engine that tells nothing need not be asked more often than that it lives.
BLIND_SECONDS = 10.0


class EnginePoll:
    """Asks while a window is open, and hands on what was answered.

    Args:
        engine: Asked by its `measure`.
        heard: Given the figures, or None if the engine did not answer; what it raises ends the
            window.
        most_seconds: Between two questions.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        heard: Callable[[EngineFigures | None], Awaitable[None]],
        most_seconds: float,
    ) -> None:
        self._engine = engine
        self._heard = heard
        self._most_seconds = most_seconds

    @contextlib.asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Ask while the body runs; what `heard` raises comes out in a group."""
        async with asyncio.TaskGroup() as group:
            poll = group.create_task(self._poll())
            try:
                yield
            finally:
                poll.cancel()

    async def _poll(self) -> None:
        seconds = POLL_SECONDS
        while True:
            await asyncio.sleep(min(seconds, self._most_seconds))
            figures = await self._engine.measure()
            seconds = BLIND_SECONDS if figures == EngineFigures() else POLL_SECONDS
            await self._heard(figures)
