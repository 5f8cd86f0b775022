"""The vitals of a run: one place that the parts of a run write to, and the heartbeat reads."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from batch_orchestration.engines.figures import EngineMetrics
from batch_orchestration.gpu.facts import GpuFacts

#: What a run waits for has limits of its own; so much later than these it is stuck.
MARGIN_SECONDS = 60.0
#: A commit waits so long for a locked store before it says so and tries again (`open_store`).
COMMIT_SECONDS = 600.0
#: Of work other than answering: each line, row and removal is a sign; it may wait for the store.
WORK_SECONDS = COMMIT_SECONDS + MARGIN_SECONDS
LOOP_SECONDS = 1.0


class RunVitals:
    """What is known of a run at this moment. Written by several threads, each its own attributes.

    Attributes:
        phase: What the run does; set by `enter`.
        own_batch_id: The batch that the run is about; set by `begin_batch`.
        batch_id: The batch in hand: its own, or a guest of it.
        chunk: The chunk that was begun last.
        progress_at: POSIX seconds of the last sign that the work goes on.
        patience_seconds: So long without such a sign is slow, not stuck.
        loop_at: When the event loop last came round; None while none is to.
        in_flight: Requests that the engine has.
        window: How many it may have now.
        derivation: How the window that the run began with came about; None if it was given.
        unheld_window: How many it might have if the care for the device held nothing back.
        restarts: Of the engine, in this run.
        engine: Its figures, as last seen.
        gpus: The devices, as last seen.
    """

    def __init__(self, *, patience_seconds: float = WORK_SECONDS) -> None:
        self.phase = "starting"
        self.own_batch_id: str | None = None
        self.batch_id: str | None = None
        self.chunk: int | None = None
        self.progress_at = time.time()
        self.patience_seconds = patience_seconds
        self.loop_at: float | None = None
        self.in_flight = 0
        self.window = 0
        self.derivation: str | None = None
        self.unheld_window = 0
        self.restarts = 0
        self.requests_per_second = 0.0
        self.output_tokens_per_second = 0.0
        self.engine: EngineMetrics | None = None
        self.gpus: tuple[GpuFacts, ...] = ()

    def note_progress(self) -> None:
        """Take note of a sign that the work goes on: an outcome, a token, a commit.

        Waiting for a reason that is known (a full disk, a pause of the breaker, a device that
        cools) is such a sign, too: call this at each look at the reason.
        """
        self.progress_at = time.time()

    def enter(self, phase: str, *, patience_seconds: float) -> None:
        """Begin a phase, in which so long without progress is not yet stuck."""
        self.phase = phase
        self.patience_seconds = patience_seconds
        self.note_progress()

    def begin_batch(self, batch_id: str) -> None:
        """Take note of the batch that the run is about now."""
        self.own_batch_id = self.batch_id = batch_id

    def begin_chunk(self, batch_id: str, number: int) -> None:
        """Take note of the chunk that is begun now."""
        self.batch_id = batch_id
        self.chunk = number

    @contextlib.asynccontextmanager
    async def of_the_loop(self) -> AsyncIterator[None]:
        """Keep `loop_at` current during the body: a loop that is blocked does not come round."""
        rounds = asyncio.create_task(self._come_round())
        try:
            yield
        finally:
            rounds.cancel()
            self.loop_at = None

    async def _come_round(self) -> None:
        while True:
            self.loop_at = time.time()
            await asyncio.sleep(LOOP_SECONDS)
