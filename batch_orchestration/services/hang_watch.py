"""Tells an engine that is stuck from one that is slow."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from batch_orchestration.domain.errors import EngineDied
from batch_orchestration.engines.base import Engine

logger = logging.getLogger(__name__)

#: How much longer than the longest pause between two signs of progress seen so far.
PATIENCE = 5.0
POLLS_PER_LIMIT = 12


class HangWatch:
    """Watches the signs of progress: outcomes, and the engine's own count of tokens.

    An engine with requests in flight that gives neither for `floor_seconds`, or for `PATIENCE`
    times its longest pause so far, is stopped and counts as dead. Slow requests alone never
    trip it: tokens are generated all the while.

    Args:
        moved: Told of each sign of progress.
    """

    def __init__(
        self, engine: Engine, *, floor_seconds: float, moved: Callable[[], None] = lambda: None
    ) -> None:
        self._engine = engine
        self._tell_moved = moved
        self._floor_seconds = floor_seconds
        self._moved_at = 0.0
        self._longest_pause = 0.0
        self._number: float | None = None

    @property
    def limit_seconds(self) -> float:
        """How long a pause may be now."""
        return max(self._floor_seconds, PATIENCE * self._longest_pause)

    def note_progress(self) -> None:
        """Take note of an outcome."""
        now = asyncio.get_running_loop().time()
        self._longest_pause = max(self._longest_pause, now - self._moved_at)
        self._moved_at = now
        self._tell_moved()

    @contextlib.asynccontextmanager
    async def watching(self, in_flight: Callable[[], int]) -> AsyncIterator[None]:
        """Watch while the body runs; raises `EngineDied` in a group if the engine is stuck."""
        self._moved_at = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch(in_flight))
            try:
                yield
            finally:
                watch.cancel()

    async def _watch(self, in_flight: Callable[[], int]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._floor_seconds / POLLS_PER_LIMIT)
            if not in_flight():
                self._moved_at = loop.time()
                continue
            number = await self._engine.progress()
            if number is not None and number != self._number:
                self._number = number
                self.note_progress()
            pause = loop.time() - self._moved_at
            if pause > self.limit_seconds:
                logger.error("the engine is stuck; ending it")
                await asyncio.to_thread(self._engine.stop)
                raise EngineDied(
                    f"stuck: no outcome and no token for {pause:.0f} s with"
                    f" {in_flight()} requests in flight"
                )
