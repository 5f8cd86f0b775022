"""Tells an engine that is stuck from one that is slow."""

import asyncio
import logging
from collections.abc import Callable

from batch_orchestration.core.errors import EngineDied
from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.figures import EngineMetrics

logger = logging.getLogger(__name__)

#: How much longer than the longest pause between two signs of progress seen so far.
PATIENCE = 5.0
#: Until the first token after a start, in `floor_seconds`: kernels are compiled on first use.
FIRST_TOKEN_FLOORS = 3.0
#: Looks at an engine per `floor_seconds`, at least.
LOOKS_PER_LIMIT = 12
#: Between two looks, at an engine that lets each question run into its time limit. In whatever was
#: longer this process did not run either: it was frozen, with its engine or for itself.
LONGEST_STEP_SECONDS = 30.0


class HangWatch:
    """Watches the signs of progress: outcomes, and whatever moves in the engine's own figures.

    An engine with requests in flight that gives neither for `floor_seconds`, or for `PATIENCE`
    times its longest pause so far, is stopped and counts as dead. Slow requests alone never
    trip it: tokens are generated all the while, and while a long prompt is read, whose tokens count
    when it has been read, the KV cache fills. Of an engine that answers and counts no tokens
    nothing can be said, and the time limit of each request decides.

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
        self._looked_at = 0.0
        self._longest_pause = 0.0
        self._figures: EngineMetrics | None = None
        self._is_new = True

    @property
    def limit_seconds(self) -> float:
        """How long a pause may be now."""
        floor = self._floor_seconds * (FIRST_TOKEN_FLOORS if self._is_new else 1.0)
        return max(floor, PATIENCE * self._longest_pause)

    def note_start(self) -> None:
        """Take note that the engine was started: it has given nothing yet."""
        self._figures, self._is_new = None, True

    def begin(self) -> None:
        """Begin to watch: pauses count from now on."""
        self._moved_at = self._looked_at = asyncio.get_running_loop().time()

    def note_progress(self) -> None:
        """Take note of an outcome, or of a token."""
        self._move(still_new=False)

    async def judge(self, figures: EngineMetrics | None, *, in_flight: int) -> None:
        """Judge the engine by what it tells; None if it did not answer.

        Raises:
            EngineDied: It is stuck, and was stopped.
        """
        if not in_flight:
            self.begin()
            return
        if figures is not None:
            self._compare(figures)
        pause = self._look() - self._moved_at
        if pause > self.limit_seconds:
            logger.error("the engine is stuck; ending it")
            await asyncio.to_thread(self._engine.stop)
            raise EngineDied(
                f"stuck: no outcome and no token for {pause:.0f} s with"
                f" {in_flight} requests in flight"
            )

    def _compare(self, figures: EngineMetrics) -> None:
        before, self._figures = self._figures, figures
        if figures.tokens is None or (before and figures.tokens != before.tokens):
            self.note_progress()
        elif figures != before:
            self._move(still_new=self._is_new)

    def _move(self, *, still_new: bool) -> None:
        now = self._look()
        if not self._is_new:  # what is only slow once says nothing of later pauses
            self._longest_pause = max(self._longest_pause, now - self._moved_at)
        self._moved_at, self._is_new = now, still_new
        self._tell_moved()

    def _look(self) -> float:
        """Return the time, with the time in which nobody could look left out of the pause."""
        now = asyncio.get_running_loop().time()
        self._moved_at += max(0.0, now - self._looked_at - LONGEST_STEP_SECONDS)
        self._looked_at = now
        return now
