"""Waits out errors that pause a run and do no harm.

These are a full disk, a lack of file descriptors, and a journal in use.
"""

import asyncio
import logging
from collections.abc import Callable

from batch_orchestration.core.errors import DiskFull, Shortage, TooManyOpenFiles
from batch_orchestration.inference.chunk_pass import TransientError
from batch_orchestration.inference.window.window import RequestWindow
from batch_orchestration.workers.run_status import RunStatus

logger = logging.getLogger(__name__)

#: Between two attempts after a transient error.
RETRY_POLL_SECONDS = 1.0
#: During a delay, between checks whether the feed is to end.
DELAY_POLL_SECONDS = 0.5
#: Between two warnings about transient errors.
WARNING_SECONDS = 60.0


class TransientErrors:
    """Waits out one transient error after the other, and logs it at most once a minute.

    Args:
        status: Each attempt or check is noted there: a wait with a known reason is not a stall.
        window: Waiting is pointless once this window has closed for good.
    """

    def __init__(self, status: RunStatus, window: RequestWindow | None = None) -> None:
        self._status = status
        self._window = window
        self._warned_at = -WARNING_SECONDS

    @property
    def _is_over(self) -> bool:
        return self._window is not None and self._window.stop is not None

    async def durably(self, record: Callable[[], object]) -> bool:
        """Run a step that needs the disk; after a shortage, wait and run it again.

        Returns:
            Whether the step was done; False if the window closed first.
        """
        while True:
            try:
                record()
            except Shortage as shortage:
                if self._is_over:
                    return False
                await self.wait(shortage)
            else:
                return True

    async def delay(self, seconds: float, *, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait between two attempts, which takes minutes if the engine asks for that.

        The wait ends early if the window closes for good, or if `unless` holds.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while (left := until - loop.time()) > 0 and not self._is_over and not unless():
            self._status.note_progress()
            await asyncio.sleep(min(left, DELAY_POLL_SECONDS))

    async def wait(self, transient: TransientError) -> None:
        """Wait until the next attempt."""
        now = asyncio.get_running_loop().time()
        if now - self._warned_at > WARNING_SECONDS:
            self._warned_at = now
            logger.warning("paused until %s, nothing is lost: %s", _until(transient), transient)
        self._status.note_progress()
        await asyncio.sleep(RETRY_POLL_SECONDS)


def _until(transient: TransientError) -> str:
    match transient:
        case DiskFull():
            return "the disk has space"
        case TooManyOpenFiles():
            return "files can be opened again"
    return "the other run has finished the chunk"
