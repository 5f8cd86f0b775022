"""Writes the time breakdowns of a run to disk, for its own batch and for its guests."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from batch_orchestration.inference.batch_work import BatchWork
from batch_orchestration.inference.feeder import Feeder
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.workers.utilization import (
    RunSnapshot,
    Stage,
    TimeAccountant,
    TimeBreakdown,
    Utilization,
)
from batch_orchestration.workers.utilization_files import account_path, read_account, write_account

logger = logging.getLogger(__name__)

#: Ten samples a second cost nothing, and no part of a breakdown is off by more than one of them.
SAMPLE_SECONDS = 0.1
#: As often as the progress file.
WRITE_SECONDS = 1.0


class TimeBreakdowns:
    """Samples a run ten times a second and writes its time breakdowns once a second.

    A breakdown continues where the same run left it, because a retried step keeps its run's id.

    Args:
        own: The run's own batch.
        guests: The batches served beside it, added as they join.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        own: BatchWork,
        guests: Mapping[str, BatchWork],
        feeder: Feeder,
        run: RunContext,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own = own
        self._guests = guests
        self._feeder = feeder
        self._run = run
        self._clock = clock
        self._accountant = TimeAccountant(own.plan.batch_id)
        self._began_at = time.time()
        self._written_at = clock()
        self._written: dict[str, dict[str, float]] = {}
        self._earlier: dict[str, TimeBreakdown | None] = {}
        self._complained = False
        self._is_fed = False
        self.note()

    @contextlib.asynccontextmanager
    async def sampled(self) -> AsyncIterator[None]:
        """Sample and write while the body feeds; the time after it counts as committing."""
        sampling = asyncio.create_task(self._sample())
        try:
            yield
        finally:
            sampling.cancel()
            self.begin_committing()

    async def _sample(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(SAMPLE_SECONDS)

    def note(self) -> None:
        """Charge the time since the last sample; call where something begins or ends, too."""
        snapshot = RunSnapshot(stage=Stage.COMMITTING) if self._is_fed else self._snapshot()
        self._accountant.observe(snapshot, self._clock())

    def begin_committing(self) -> None:
        """Record that nothing is left to ask: time counts as committing from now on."""
        self.note()
        self._is_fed = True
        self.note()

    def tick(self) -> None:
        """Sample, and write if a write is due."""
        self.note()
        if self._clock() - self._written_at >= WRITE_SECONDS:
            self._written_at = self._clock()
            self._write()

    def close(self) -> None:
        """Sample and write for the last time."""
        self.note()
        self._write()

    @property
    def utilization(self) -> Utilization | None:
        """Utilization of the own batch's time by this run so far."""
        return Utilization.of([self._account(self._own.plan.batch_id)])

    def _snapshot(self) -> RunSnapshot:
        """Return the state of the run, with a fresh window, because heat may change it any time."""
        status = self._run.status
        self._feeder.window.note_limits()
        works = (self._own, *self._guests.values())
        for guest in works[1:]:
            guest.progress.in_flight = guest.unanswered
        others = sum(guest.unanswered for guest in works[1:])
        self._own.progress.in_flight = max(0, status.in_flight - others)
        return RunSnapshot(
            stage=Stage.FEEDING if status.phase == "feeding" else Stage.STARTING,
            by_batch={work.plan.batch_id: work.progress.in_flight for work in works},
            unthrottled_window=status.unthrottled_window,
            dry=self._feeder.is_dry,
            tokens=sum(work.progress.completion_tokens for work in works),
            **status.load(),
        )

    def _account(self, batch_id: str) -> TimeBreakdown:
        if batch_id not in self._earlier:
            path = account_path(self._run.folder, batch_id, self._run.run_id)
            self._earlier[batch_id] = read_account(path)
        quantities: Mapping[str, Any] = self._accountant.accounts()[batch_id]
        account = TimeBreakdown(
            batch_id=batch_id,
            run_id=self._run.run_id,
            began_at=self._began_at,
            updated_at=time.time(),
            **quantities,
        )
        earlier = self._earlier[batch_id]
        return account if earlier is None else account.after(earlier)

    def _write(self) -> None:
        """Write the breakdowns that have changed; a failed write does not stop the run."""
        try:
            for batch_id, quantities in list(self._accountant.accounts().items()):
                if quantities != self._written.get(batch_id):
                    write_account(self._run.folder, self._account(batch_id))
                    self._written[batch_id] = dict(quantities)
        except OSError as error:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "the accounts of run %s cannot be written: %s", self._run.run_id, error
                )
