"""What is done about an engine that runs out of memory: one rung gentler, as long as there is one.

On the lowest rung one more thing helps, which the engine knows nothing of: fewer requests in
flight. Above it the ladder leaves the window alone: what an engine cannot run yet waits in its
queue, where it takes no device memory, and keeps it from running dry. On the lowest rung a wide
window only means that a death makes many suspects, so there it narrows to what runs at a time.
"""

import asyncio
import logging

from batch_orchestration.core.errors import EngineDied, EngineError, EngineStartFailed
from batch_orchestration.engines.memory_ladder import Ladder

logger = logging.getLogger(__name__)


class Easing:
    """Goes down an engine's ladder, and back up when the reason is gone.

    Attributes:
        in_flight: How many requests to give to the engine at a time.
    """

    def __init__(self, ladder: Ladder, *, in_flight: int) -> None:
        self._ladder = ladder
        self._configured = in_flight
        self._trusted = True
        self.in_flight = in_flight

    async def ease(self, error: EngineError) -> bool:
        """Make things easier for the engine; return whether a restart may help now."""
        if error.exhaustion is None:
            return isinstance(error, EngineStartFailed) and self._distrust()
        if await asyncio.to_thread(self._ladder.step_down, error.exhaustion):
            logger.warning(
                "the engine ran out of memory (%s); one rung gentler: %s",
                error.exhaustion.evidence,
                self._ladder.description,
            )
            return True
        logger.warning("the engine ran out of memory on its lowest rung")
        return isinstance(error, EngineDied) and self._narrow()

    def note_culprit(self) -> None:
        """Take note that a single request exhausts the memory: the others do without the ladder."""
        self._ladder.climb_back()
        self.in_flight = self._configured

    def _narrow(self) -> bool:
        sequences = self._ladder.rung.max_num_seqs
        if sequences is None or sequences >= self.in_flight:
            return False
        logger.warning("from now on %d requests in flight", sequences)
        self.in_flight = sequences
        return True

    def _distrust(self) -> bool:
        """Give up a rung that does not even start: it may be of another version's engine. Once."""
        if not self._trusted or not self._ladder.climb_to_top():
            return False
        self._trusted = False
        logger.warning("the engine does not start on its rung; trying what is configured")
        return True
