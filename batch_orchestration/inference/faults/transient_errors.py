"""Waits out errors that pause a run and do no harm.

These are a full disk, a lack of file descriptors, and a journal in use.
"""

import asyncio
import logging
from collections.abc import Callable

from batch_orchestration.core.errors import DiskFull, Shortage, TooManyOpenFiles
from batch_orchestration.inference.chunk_pass import TransientError

logger = logging.getLogger(__name__)

#: Between two attempts after a transient error.
OBSTACLE_POLL_SECONDS = 1.0
#: During a delay, between checks whether the feed is to end.
DELAY_POLL_SECONDS = 0.5
COMPLAINT_SECONDS = 60.0


class TransientErrors:
    """Waits out one transient error after the other, and logs it at most once a minute.

    Args:
        waited: Called at each attempt or check, because a wait with a known reason is not a stall.
        is_over: Whether waiting has become pointless.
    """

    def __init__(self, *, waited: Callable[[], None], is_over: Callable[[], bool]) -> None:
        self._waited = waited
        self._is_over = is_over
        self._complained_at = -COMPLAINT_SECONDS

    async def durably(self, record: Callable[[], object]) -> bool:
        """Run a step that needs the disk; after a shortage, wait and run it again.

        Returns:
            Whether the step was done; False if `is_over` held first.
        """
        while True:
            try:
                record()
            except Shortage as shortage:
                if self._is_over():
                    return False
                await self.wait(shortage)
            else:
                return True

    async def delay(self, seconds: float, *, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait between two attempts, which takes minutes if the engine asks for that.

        The wait ends early if `is_over` or `unless` holds.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0 and not self._is_over() and not unless():
            self._waited()
            await asyncio.sleep(min(left, DELAY_POLL_SECONDS))

    async def wait(self, transient: TransientError) -> None:
        """Wait until the next attempt."""
        now = asyncio.get_running_loop().time()
        if now - self._complained_at > COMPLAINT_SECONDS:
            self._complained_at = now
            logger.warning("paused until %s, nothing is lost: %s", _until(transient), transient)
        self._waited()
        await asyncio.sleep(OBSTACLE_POLL_SECONDS)


def _until(transient: TransientError) -> str:
    match transient:
        case DiskFull():
            return "there is room"
        case TooManyOpenFiles():
            return "files can be opened again"
    return "others are done"
