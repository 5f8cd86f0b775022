"""The run status: one object that the parts of a run write to, and the heartbeat writer reads."""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.run_load import RunLoad

#: A run's waits have limits of their own; if they are exceeded by this much, the run is stuck.
MARGIN_SECONDS = 60.0
#: A commit waits this long for a locked store before it reports that and retries (`open_store`).
COMMIT_SECONDS = 600.0
#: For work other than answering: each line, row and removal counts, and may wait for the store.
WORK_SECONDS = COMMIT_SECONDS + MARGIN_SECONDS
LOOP_SECONDS = 1.0
_RATES = ("requests_per_second", "output_tokens_per_second")


class RunVitals:
    """The current state of a run. Written by several threads, each its own attributes.

    Attributes:
        phase: Current activity; set by `enter`.
        own_batch_id: The run's primary batch; set by `begin_batch`.
        batch_id: The current batch: primary or co-scheduled.
        chunk: The chunk begun last.
        progress_at: Time of the last sign of progress.
        patience_seconds: This long without progress is slow, not stuck.
        loop_at: When the event loop last came round; None while none is expected to.
        in_flight: Requests at the engine.
        window: Current limit of `in_flight`.
        derivation: How the first window of the run was derived; None if it was given.
        unheld_window: The limit without throttling.
        restarts: Number of engine restarts in this run.
        engine: Its metrics, as last read.
        gpus: The devices, as last read.
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
        """Record a sign of progress: an outcome, a token, a commit.

        Waiting for a known reason (a full disk, a pause of the breaker, a device that cools) counts
        as progress, too: call this at each check of the reason.
        """
        self.progress_at = time.time()

    def enter(self, phase: str, *, patience_seconds: float) -> None:
        """Begin a phase, in which this long without progress does not count as stuck."""
        self.phase = phase
        self.patience_seconds = patience_seconds
        self.note_progress()

    def begin_batch(self, batch_id: str) -> None:
        """Record the run's primary batch."""
        self.own_batch_id = self.batch_id = batch_id

    def begin_chunk(self, batch_id: str, number: int) -> None:
        """Record the chunk that begins now."""
        self.batch_id = batch_id
        self.chunk = number

    def load(self) -> dict[str, Any]:
        """Return the fields of a `RunLoad`, as they are now."""
        fields = {name: getattr(self, name) for name in RunLoad.__struct_fields__}
        return fields | {name: finite(fields[name]) for name in _RATES}

    @contextlib.asynccontextmanager
    async def of_the_loop(self) -> AsyncIterator[None]:
        """Keep `loop_at` current during the body; a blocked event loop does not come round."""
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


def finite(number: float, *, otherwise: float = 0.0) -> float:
    """Return a number that JSON can represent."""
    return number if math.isfinite(number) else otherwise
