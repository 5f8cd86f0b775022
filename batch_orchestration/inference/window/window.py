"""Limits the requests at the engine at this moment, and polls the engine's metrics for that.

The lowest of several limits holds. The window may narrow while it is full. Requests in flight are
not cancelled for that; they are only not replaced until there is room again.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable

from batch_orchestration.engines.base import Engine, EngineInfo
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.inference.faults.oom_recovery import OomRecovery
from batch_orchestration.inference.open_files import connections_possible
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.inference.window.control import WindowControl

logger = logging.getLogger(__name__)

#: Between checks of a full window, because a change of the throttling raises no event.
LOOK_SECONDS = 0.5
#: vLLM updates its metrics with every step; the window need not follow faster than this.
POLL_SECONDS = 1.0
#: An engine without metrics is polled only to see that it is alive.
BLIND_SECONDS = 10.0


class RequestWindow:
    """Opens and closes for one request after the other.

    Args:
        run: Its policy has the initial width, and whether the window then follows the engine; the
            limits are recorded in its status.
        memory: Its `in_flight` limits the window, too, as does the number of possible connections.
    """

    def __init__(self, run: RunContext, *, memory: OomRecovery) -> None:
        self._policy, self._status, self._throttle = run.policy, run.status, run.throttle
        self._control = WindowControl(run.policy.in_flight, run.policy.bounds)
        self._memory = memory
        self._changed = asyncio.Event()
        self._share = 1.0
        self._settled = 0

    @property
    def stop(self) -> str | None:
        """Why the engine may get nothing more; None while it may."""
        return self._throttle().stop

    @property
    def limit(self) -> int:
        """How many requests may be in flight now; 0 is a pause.

        Throttling scales the window that is left after the memory limit, so that it has an effect
        even on a window that memory narrows. Only a share of 0 pauses the run.
        """
        share = self._throttle().share
        return max(1, math.floor(share * self.unthrottled)) if share > 0 else 0

    @property
    def unthrottled(self) -> int:
        """How many requests might be in flight now without throttling."""
        return min(self._control.width, self._memory.in_flight, connections_possible())

    @property
    def is_paused(self) -> bool:
        """Whether throttling allows no request at all."""
        return self._throttle().share == 0

    @property
    def is_limited(self) -> bool:
        """Whether something other than the width keeps the window narrow."""
        return self.limit < self._control.width

    def note_limits(self) -> None:
        """Record the present limits in the run status."""
        self._status.window, self._status.unthrottled_window = self.limit, self.unthrottled

    def begin(self, engine: EngineInfo) -> str | None:
        """Set the width for an engine that has just started.

        Returns:
            The derivation of the width; None if the width was given.
        """
        if self._policy.derive is None:
            return None
        derived = self._policy.derive(engine)
        logger.info("%s", derived)
        self._control = WindowControl(int(derived.value), self._policy.bounds)
        return str(derived)

    def follow(self, metrics: EngineMetrics | None, *, now: float) -> None:
        """Follow the engine's metrics, unless something else keeps the window narrow."""
        metrics = None if self.is_limited else metrics
        before, in_flight = self._control.width, self._status.in_flight
        if self._control.note(metrics, in_flight=in_flight, settled=self._settled, now=now):
            after = self._control.width
            logger.info("window %d, was %d: %s", after, before, self._control.reason)
            self.check_again()
        self.note_limits()

    def note_settled(self) -> None:
        """Count an outcome; the rate of outcomes shows how long the engine takes for one."""
        self._settled += 1

    async def open(self, taken: Callable[[], int]) -> bool:
        """Wait until there is room for one more; return False if nothing more may be sent."""
        while self.stop is None:
            self._log_pause()
            if taken() < self.limit:
                return True
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._changed.wait()
        return False

    def check_again(self) -> None:
        """Wake the waiting feeder: a request has ended, or the window is wider."""
        self._changed.set()

    def _log_pause(self) -> None:
        """Log once when throttling pauses the run, and once when the run goes on."""
        share = self._throttle().share
        if share == 0:
            self._status.note_progress()
        if share == 0 < self._share:
            logger.warning("paused while the device cools; requests in flight go on")
        elif share > 0 == self._share:
            logger.info("resumed: the device is cool enough for %.0f %% of the window", share * 100)
        self._share = share


class EnginePoll:
    """Polls the engine while a window is open, and passes its metrics on.

    Args:
        react: Called with the metrics, or None without an answer; its exceptions end the window.
        most_seconds: The longest time between two polls.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        react: Callable[[EngineMetrics | None], Awaitable[None]],
        most_seconds: float,
    ) -> None:
        self._engine = engine
        self._react = react
        self._most_seconds = most_seconds

    @contextlib.asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Poll while the body runs; exceptions of `react` are raised in a group."""
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
            metrics = await self._engine.measure()
            seconds = BLIND_SECONDS if metrics == EngineMetrics() else POLL_SECONDS
            await self._react(metrics)
