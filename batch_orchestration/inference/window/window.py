"""How many requests may be at the engine at this moment: the least of what several parties allow.

The window may narrow while it is full. Nothing in flight is cancelled for that: it is only not
replaced until there is room again.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.figures import EngineMetrics
from batch_orchestration.estimates.derivation import Derived
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.faults.retries import BreakerPolicy, RetryPolicy
from batch_orchestration.inference.window.control import Bounds, WindowControl

logger = logging.getLogger(__name__)
#: Between looks at a window that is full: the care for the device tells nobody when it changes.
LOOK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Window:
    """How much is given to the engine, and how often a request or the engine gets another chance.

    Attributes:
        in_flight: Requests given to the engine at a time, at first.
        bounds: Between what that may become by what the engine tells; None if it is fixed.
        derive: The same from what an engine that was started says of itself.
        engine_restarts: How often a dead engine is started anew before the run gives up.
        hang_seconds: Without any sign of progress the engine counts as dead after this, or after
            a multiple of the latencies seen, if that is longer.
        start_timeout_seconds: Until the engine is ready; its own limit, here to know what is late.
    """

    in_flight: int
    bounds: Bounds | None = None
    derive: Callable[[Mapping[str, Any]], Derived] | None = None
    retry: RetryPolicy
    breaker: BreakerPolicy
    engine_restarts: int
    hang_seconds: float
    start_timeout_seconds: float = 900.0

    @property
    def most(self) -> int:
        """How many requests may be in flight at any time."""
        return self.in_flight if self.bounds is None else self.bounds.most


class RequestWindow:
    """Opens and closes for one request after the other.

    Args:
        window: How wide it is at first, and whether it follows the engine from then on.
        most: How many requests may be in flight whatever else is said.
        care: What the care for the device allows now.
        waited: Told of each look during a pause, for a wait with a reason is no standstill.
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
        """Why nothing more may be given to the engine; None while it may."""
        return self._care().stop

    @property
    def limit(self) -> int:
        """How many requests may be in flight now; 0 is a pause.

        The device's share of what might be in flight else, so that each step back is one for a
        device that narrow memory holds back already; only a share of 0 allows none at all.
        """
        share = self._care().share
        return max(1, math.floor(share * self.unheld)) if share > 0 else 0

    @property
    def unheld(self) -> int:
        """How many might be in flight now if the care for the device held nothing back."""
        return min(self._control.width, self._most())

    @property
    def is_paused(self) -> bool:
        """Whether the care for the device allows none at all."""
        return self._care().share == 0

    @property
    def is_curbed(self) -> bool:
        """Whether something else than the width keeps the window narrow."""
        return self.limit < self._control.width

    def begin(self, figures: Mapping[str, Any]) -> str | None:
        """Set the width for an engine that has just started, by what it tells of itself.

        Returns:
            How the width came about; None if it was given.
        """
        if self._window.derive is None:
            return None
        derived = self._window.derive(figures)
        logger.info("%s", derived)
        self._control = WindowControl(int(derived.value), self._window.bounds)
        return str(derived)

    def hear(self, figures: EngineMetrics | None, *, in_flight: int, now: float) -> None:
        """Follow what the engine tells of its work, unless something else keeps it narrow."""
        told = None if self.is_curbed else figures
        before = self._control.width
        if self._control.note(told, in_flight=in_flight, settled=self._settled, now=now):
            after = self._control.width
            logger.info("window %d, was %d: %s", after, before, self._control.reason)
            self.look_again()

    def note_settled(self) -> None:
        """Take note of an outcome: their rate tells how long the engine takes for one."""
        self._settled += 1

    async def open(self, taken: Callable[[], int]) -> bool:
        """Wait until there is room for one more; return False if nothing more may be given."""
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
        """Wake whoever waits: a request has ended, or the window is wider."""
        self._changed.set()

    def _tell(self) -> None:
        """Log once that the care for the device pauses the run, and once that it goes on."""
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
        heard: Callable[[EngineMetrics | None], Awaitable[None]],
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
            seconds = BLIND_SECONDS if figures == EngineMetrics() else POLL_SECONDS
            await self._heard(figures)
