"""Waits for what keeps a run from going on and harms nothing.

A full disk, a lack of descriptors, a journal in use.
"""

import asyncio
import logging
from collections.abc import Callable

from batch_orchestration.core.errors import DiskFull, Shortage, TooManyOpenFiles
from batch_orchestration.inference.chunk_pass import TransientError

logger = logging.getLogger(__name__)

#: Between looks at an obstacle.
OBSTACLE_POLL_SECONDS = 1.0
#: During a delay, between looks whether everything is to end.
DELAY_POLL_SECONDS = 0.5
COMPLAINT_SECONDS = 60.0


class TransientErrors:
    """Waits for one obstacle after the other, and says so once a minute.

    Args:
        waited: Told of each look, for a wait with a reason is no standstill.
        is_over: Whether nothing is worth a wait any more.
    """

    def __init__(self, *, waited: Callable[[], None], is_over: Callable[[], bool]) -> None:
        self._waited = waited
        self._is_over = is_over
        self._complained_at = -COMPLAINT_SECONDS

    async def durably(self, record: Callable[[], object]) -> bool:
        """Do what needs the disk; while there is a shortage, wait for its end and do it again.

        Returns:
            Whether it is done; not, if everything was over before.
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
        """Wait between two attempts: minutes, where the engine asks for it.

        Not until then if everything is over before, or there is to be no other attempt.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0 and not self._is_over() and not unless():
            self._waited()
            await asyncio.sleep(min(left, DELAY_POLL_SECONDS))

    async def wait(self, transient: TransientError) -> None:
        """Wait until it is worth another look."""
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
