"""What a run that works on a batch does about its early end: it notices, and stops in time."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from typing import Any

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import FileDamaged, Shortage
from batch_orchestration.core.lifecycle import Closing, deadline
from batch_orchestration.files.atomic import shortages
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.services.clock_watch import EXPIRY_SECONDS, clock_doubt
from batch_orchestration.services.closing import expire

logger = logging.getLogger(__name__)

#: A person who cancels should see it happen.
LOOK_SECONDS = 1.0
#: Between two requests to stop; one that falls together with the engine's death may be missed.
INSIST_SECONDS = 1.0
#: For commits of complete chunks after that; a locked store must not hold up the end of the run.
COMMIT_SECONDS = 4.0


class ClosingWatch:
    """Looks whether a batch is to end early: a person's decision, or its deadline.

    Args:
        plan: Of the batch.
        folder: The data folder.
        run_id: Of the run that looks; it expires the batch where nobody else did.
        only_new: Whether neither deadline nor a decision from before are of account.

    Attributes:
        seen: The decision, once it was seen.
        deadline: When the batch's window ends, POSIX seconds.
    """

    def __init__(
        self, plan: BatchPlan, folder: DataFolder, *, run_id: str, only_new: bool = False
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._run_id = run_id
        self._known = folder.read_closing(plan.batch_id) if only_new else None
        resumption = folder.read_resumption(plan.batch_id)
        self.deadline = float("inf") if only_new else deadline(plan, resumption)
        self.seen: Closing | None = None
        self._seen_at = 0.0
        self._told_of_damage = self._told_of_doubt = False

    @property
    def impatient(self) -> bool:
        """Whether the run ought to have ended: what is not committed by now is closed out later."""
        return self.seen is not None and time.monotonic() - self._seen_at > COMMIT_SECONDS

    def look(self) -> Closing | None:
        """Return the decision, if there is one; what cannot be opened now may be next time."""
        with (
            contextlib.suppress(Shortage),
            shortages(self._folder.closing_path(self._plan.batch_id)),
        ):
            self._look()
        return self.seen

    def _look(self) -> None:
        now = time.time()
        if self.seen is None and (found := self._read()) != self._known:
            self.seen = found
        if self.seen is None and now >= self.deadline and self._clock_is_right():
            self.seen = expire(self._plan, folder=self._folder, actor=self._run_id, now=now)

    def _clock_is_right(self) -> bool:
        doubt = clock_doubt(self._folder, most_seconds=EXPIRY_SECONDS)
        if doubt is not None and not self._told_of_doubt:
            self._told_of_doubt = True
            logger.warning("%s seems to be overdue and goes on: %s", self._plan.batch_id, doubt)
        return doubt is None

    def _read(self) -> Closing | None:
        """Return the decision; one that cannot be read stops no run, but no other is begun then."""
        try:
            return self._folder.read_closing(self._plan.batch_id)
        except FileDamaged as damaged:
            if not self._told_of_damage:
                logger.warning("%s; this run goes on", damaged)
            self._told_of_damage = True
            return self._known

    async def unless_closed(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work; as soon as the batch is to end, abort it and return.

        What the work raises by itself is raised.
        """
        if self._noticed():
            work.close()
            return
        working = asyncio.ensure_future(work)
        try:
            while not working.done():
                await asyncio.wait({working}, timeout=LOOK_SECONDS)
                if not working.done() and self._noticed():
                    await _abort(working)
                    return
        except asyncio.CancelledError:
            # The run itself is being stopped.
            await _abort(working)
            raise
        await working

    def _noticed(self) -> bool:
        if self.look() is None:
            return False
        self._seen_at = time.monotonic()
        logger.warning(
            "%s ends early, %s; what is in flight is let go", self._plan.batch_id, self.seen
        )
        return True


async def _abort(working: asyncio.Future[None]) -> None:
    while not working.done():
        working.cancel()
        await asyncio.wait({working}, timeout=INSIST_SECONDS)
    if not working.cancelled() and (error := working.exception()) is not None:
        logger.warning("while it was stopped: %s", error)
