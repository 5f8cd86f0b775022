"""Limits the requests at the engine at this moment: the lowest of several limits holds.

The window may narrow while it is full. Requests in flight are not cancelled for that; they are only
not replaced until there is room again.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from batch_orchestration.engines.base import Engine, EngineInfo
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.estimates.derivation import Derived
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.faults.retries import BreakerPolicy, RetryPolicy
from batch_orchestration.inference.window.control import Bounds, WindowControl

logger = logging.getLogger(__name__)
#: Between checks of a full window, because a change of the throttling raises no event.
LOOK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Window:
    """How many requests the engine gets, and how often requests and engine are tried again.

    Attributes:
        in_flight: Initial number of requests given to the engine at a time.
        bounds: Limits within which that number follows the engine's metrics; None if it is fixed.
        derive: Derives that number for an engine that was started.
        engine_restarts: How often a dead engine is restarted before the run gives up.
        hang_seconds: Time without progress after which the engine counts as dead; a multiple of the
            longest pause so far replaces it if that is longer.
        start_timeout_seconds: Until the engine is ready. The engine enforces this limit itself;
            here it tells when a start is late.
    """

    in_flight: int
    bounds: Bounds | None = None
    derive: Callable[[EngineInfo], Derived] | None = None
    retry: RetryPolicy
    breaker: BreakerPolicy
    engine_restarts: int
    hang_seconds: float
    start_timeout_seconds: float = 900.0

    @property
    def most(self) -> int:
        """The most requests that may be in flight at any time."""
        return self.in_flight if self.bounds is None else self.bounds.most


class RequestWindow:
    """Opens and closes for one request after the other.

    Args:
        window: Initial width, and whether it then follows the engine.
        most: The most requests that may be in flight, regardless of the width.
        throttle: Returns the present throttling of the devices.
        waited: Called at each check during a pause: a wait with a known reason is not a stall.
    """

    def __init__(
        self,
        window: Window,
        *,
        most: Callable[[], int],
        throttle: Callable[[], Throttle],
        waited: Callable[[], None] = lambda: None,
    ) -> None:
        self._window = window
        self._control = WindowControl(window.in_flight, window.bounds)
        self._most = most
        self._care = throttle
        self._waited = waited
        self._changed = asyncio.Event()
        self._share = 1.0
        self._settled = 0

    @property
    def stop(self) -> str | None:
        """Why the engine may get nothing more; None while it may."""
        return self._care().stop

    @property
    def limit(self) -> int:
        """How many requests may be in flight now; 0 is a pause.

        Throttling scales the window that is left after the memory limit, so that it has an effect
        even on a window that memory narrows. Only a share of 0 pauses the run.
        """
        share = self._care().share
        return max(1, math.floor(share * self.unheld)) if share > 0 else 0

    @property
    def unheld(self) -> int:
        """How many requests might be in flight now without throttling."""
        return min(self._control.width, self._most())

    @property
    def is_paused(self) -> bool:
        """Whether throttling allows no request at all."""
        return self._care().share == 0

    @property
    def is_curbed(self) -> bool:
        """Whether something other than the width keeps the window narrow."""
        return self.limit < self._control.width

    def begin(self, engine: EngineInfo) -> str | None:
        """Set the width for an engine that has just started.

        Returns:
            The derivation of the width; None if the width was given.
        """
        if self._window.derive is None:
            return None
        derived = self._window.derive(engine)
        logger.info("%s", derived)
        self._control = WindowControl(int(derived.value), self._window.bounds)
        return str(derived)

    def hear(self, figures: EngineMetrics | None, *, in_flight: int, now: float) -> None:
        """Follow the engine's metrics, unless something else keeps the window narrow."""
        told = None if self.is_curbed else figures
        before = self._control.width
        if self._control.note(told, in_flight=in_flight, settled=self._settled, now=now):
            after = self._control.width
            logger.info("window %d, was %d: %s", after, before, self._control.reason)
            self.look_again()

    def note_settled(self) -> None:
        """Count an outcome; the rate of outcomes shows how long the engine takes for one."""
        self._settled += 1

    async def open(self, taken: Callable[[], int]) -> bool:
        """Wait until there is room for one more; return False if nothing more may be sent."""
        while self.stop is None:
            self._tell()
            if taken() < self.limit:
                return True
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._changed.wait()
        return False

    def look_again(self) -> None:
        """Wake the waiting feeder: a request has ended, or the window is wider."""
        self._changed.set()

    def _tell(self) -> None:
        """Log once when throttling pauses the run, and once when the run goes on."""
        share = self._care().share
        if share == 0:
            self._waited()
        if share == 0 < self._share:
            logger.warning("paused: the device needs a rest; what is in flight is kept")
        elif share > 0 == self._share:
            logger.info(
                "going on: the device is ready again, for %.0f %% of the window", share * 100
            )
        self._share = share


#: vLLM updates its metrics with every step; the window need not follow faster than this.
POLL_SECONDS = 1.0
#: An engine without metrics is polled only to see that it is alive.
BLIND_SECONDS = 10.0


class EnginePoll:
    """Polls the engine while a window is open, and passes its metrics on.

    Args:
        engine: Polled by `measure`.
        heard: Called with the metrics, or None without an answer; its exceptions end the window.
        most_seconds: The longest time between two polls.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        heard: Callable[[EngineMetrics | None], Awaitable[None]],
        most_seconds: float,
    ) -> None:
        self._engine = engine
        self._heard = heard
        self._most_seconds = most_seconds

    @contextlib.asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Poll while the body runs; exceptions of `heard` are raised in a group."""
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
            seconds = BLIND_SECONDS if figures == EngineMetrics() else POLL_SECONDS
            await self._heard(figures)
