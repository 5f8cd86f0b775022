"""Writes the time breakdowns of a run to disk, for its own batch and for its guests."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping

from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.inference.batch_work import BatchWork
from batch_orchestration.inference.feeder import Feeder
from batch_orchestration.workers.utilization import (
    RunSnapshot,
    Stage,
    TimeAccountant,
    TimeBreakdown,
    Utilization,
    kept,
)
from batch_orchestration.workers.utilization_files import account_path, read_account, write_account
from batch_orchestration.workers.vitals import RunVitals

logger = logging.getLogger(__name__)

#: Ten samples a second cost nothing, and no part of a breakdown is off by more than one of them.
LOOK_SECONDS = 0.1
#: As often as the progress file.
WRITE_SECONDS = 1.0


class TimeBreakdowns:
    """Samples a run ten times a second and writes its time breakdowns once a second.

    A breakdown continues where the same run left it, because a retried step keeps its run's id.

    Args:
        own: The run's own batch.
        guests: The batches served beside it, added as they join.
        clock: Monotonic seconds.

    Attributes:
        feeder: None until there is something to ask.
    """

    def __init__(
        self,
        own: BatchWork,
        guests: Mapping[str, BatchWork],
        *,
        folder: DataFolder,
        run_id: str,
        vitals: RunVitals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.feeder: Feeder | None = None
        self._own = own
        self._guests = guests
        self._folder = folder
        self._run_id = run_id
        self._vitals = vitals
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
    async def looking(self) -> AsyncIterator[None]:
        """Sample and write while the body feeds; the time after it counts as committing."""
        watch = asyncio.create_task(self._keep_looking())
        try:
            yield
        finally:
            watch.cancel()
            self.begin_committing()

    async def _keep_looking(self) -> None:
        while True:
            self.tick()
            await asyncio.sleep(LOOK_SECONDS)

    def note(self) -> None:
        """Charge the time since the last sample; call where something begins or ends, too."""
        moment = RunSnapshot(stage=Stage.COMMITTING) if self._is_fed else self._moment()
        self._accountant.observe(moment, self._clock())

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
    def kept_so_far(self) -> Utilization | None:
        """Utilization of the own batch's time by this run so far."""
        return kept([self._account(self._own.plan.batch_id)])

    def _moment(self) -> RunSnapshot:
        """Return the state of the run, with a fresh window, because heat may change it any time."""
        vitals, feeder = self._vitals, self.feeder
        if feeder is None:
            return RunSnapshot(stage=Stage.STARTING, restarts=vitals.restarts)
        feeder.note_window()
        by_batch = {batch_id: guest.unanswered for batch_id, guest in self._guests.items()}
        by_batch[self._own.plan.batch_id] = max(0, feeder.in_flight - sum(by_batch.values()))
        works = (self._own, *self._guests.values())
        return RunSnapshot(
            stage=Stage.FEEDING if vitals.phase == "feeding" else Stage.STARTING,
            in_flight=feeder.in_flight,
            by_batch=by_batch,
            window=vitals.window,
            unheld_window=vitals.unheld_window,
            dry=feeder.is_dry,
            engine=vitals.engine,
            tokens=sum(work.progress.completion_tokens for work in works),
            restarts=vitals.restarts,
        )

    def _account(self, batch_id: str) -> TimeBreakdown:
        if batch_id not in self._earlier:
            path = account_path(self._folder, batch_id, self._run_id)
            self._earlier[batch_id] = read_account(path)
        account = TimeBreakdown(
            batch_id=batch_id,
            run_id=self._run_id,
            began_at=self._began_at,
            updated_at=time.time(),
            **self._accountant.accounts()[batch_id],
        )
        earlier = self._earlier[batch_id]
        return account if earlier is None else account.after(earlier)

    def _write(self) -> None:
        """Write the breakdowns that have changed; a failed write does not stop the run."""
        try:
            for batch_id, quantities in list(self._accountant.accounts().items()):
                if quantities != self._written.get(batch_id):
                    write_account(self._folder, self._account(batch_id))
                    self._written[batch_id] = dict(quantities)
        except OSError as error:
            if not self._complained:
                self._complained = True
                logger.warning("the accounts of run %s cannot be written: %s", self._run_id, error)
