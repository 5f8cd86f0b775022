"""Distinguishes an engine that is stuck from one that is slow."""

import asyncio
import logging

from batch_orchestration.core.errors import EngineDied
from batch_orchestration.core.waiting import IdleClock
from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.workers.run_status import MARGIN_SECONDS, RunStatus

logger = logging.getLogger(__name__)

#: Multiple of the longest pause seen so far between two signs of progress.
PATIENCE = 5.0
#: Limit until the first token after a start, in `floor_seconds`: kernels are compiled on first use.
FIRST_TOKEN_FLOORS = 3.0
#: Polls of an engine per `floor_seconds`, at least.
POLLS_PER_LIMIT = 12
#: Longest time between two polls, for an engine whose polls all run into their time limit. If more
#: time passes, this process was suspended, with its engine or without it.
LONGEST_STEP_SECONDS = 30.0


class HangWatch:
    """Watches for signs of progress: outcomes, and any change of the engine's metrics.

    If an engine with requests in flight shows no sign for longer than `floor_seconds` and for
    longer than `PATIENCE` times its longest pause so far, it is stopped and counts as dead. Slow
    requests do not trigger it: generated tokens, or KV-cache growth during prefill, count as
    progress. Engines that expose no token counters are exempt; the per-request timeout covers them.

    Args:
        status: Signs of progress are noted there, and the time that may pass between them.
    """

    def __init__(self, engine: Engine, *, floor_seconds: float, status: RunStatus) -> None:
        self._engine = engine
        self._status = status
        self._floor_seconds = floor_seconds
        self._idle = IdleClock(longest_step=LONGEST_STEP_SECONDS, now=0.0)
        self._longest_pause = 0.0
        self._metrics: EngineMetrics | None = None
        self._is_new = True

    @property
    def limit_seconds(self) -> float:
        """The longest pause that is allowed now."""
        floor = self._floor_seconds * (FIRST_TOKEN_FLOORS if self._is_new else 1.0)
        return max(floor, PATIENCE * self._longest_pause)

    @property
    def patience_seconds(self) -> float:
        """Time without progress that is only slow: this watch ends a stuck engine earlier."""
        return self.limit_seconds + MARGIN_SECONDS

    def note_start(self) -> None:
        """Record that the engine was started and has produced nothing yet."""
        self._metrics, self._is_new = None, True

    def begin(self) -> None:
        """Begin to watch: pauses count from now on."""
        self._idle.restart(_now())

    def note_progress(self) -> None:
        """Record an outcome or a token."""
        self._move(still_new=False)

    async def judge(self, metrics: EngineMetrics | None) -> None:
        """Judge the engine by its metrics; None if it did not answer.

        Raises:
            EngineDied: The engine was stuck and has been stopped.
        """
        in_flight = self._status.in_flight
        if not in_flight:
            self.begin()
            return
        if metrics is not None:
            self._compare(metrics)
        pause = self._idle.check(_now())
        if pause > self.limit_seconds:
            logger.error("the engine is stuck and is being stopped")
            await asyncio.to_thread(self._engine.stop)
            raise EngineDied(
                f"stuck: no outcome and no token for {pause:.0f} s with"
                f" {in_flight} requests in flight"
            )

    def _compare(self, metrics: EngineMetrics) -> None:
        before, self._metrics = self._metrics, metrics
        if metrics.tokens is None or (before and metrics.tokens != before.tokens):
            self.note_progress()
        elif metrics != before:
            self._move(still_new=self._is_new)

    def _move(self, *, still_new: bool) -> None:
        pause = self._idle.check(_now())
        if not self._is_new:  # a slow first token does not predict later pauses
            self._longest_pause = max(self._longest_pause, pause)
        self._idle.restart(_now())
        self._is_new = still_new
        self._status.patience_seconds = self.patience_seconds
        self._status.note_progress()


def _now() -> float:
    return asyncio.get_running_loop().time()
