"""The vitals of a run: one place that the parts of a run write to, and the heartbeat reads."""

import time

from batch_orchestration.domain.engine_figures import EngineFigures
from batch_orchestration.domain.gpu import GpuFacts


class RunVitals:
    """What is known of a run at this moment. Written by several threads, each its own attributes.

    Attributes:
        phase: What the run does; set by `enter`.
        batch_id: The batch in hand.
        chunk: The chunk that was begun last.
        progress_at: POSIX seconds of the last sign that the work goes on.
        patience_seconds: So long without such a sign is slow, not stuck.
        in_flight: Requests that the engine has.
        window: How many it may have now.
        restarts: Of the engine, in this run.
        engine: Its figures, as last seen.
        gpus: The devices, as last seen.
    """

    def __init__(self, *, patience_seconds: float) -> None:
        self.phase = "starting"
        self.batch_id: str | None = None
        self.chunk: int | None = None
        self.progress_at = time.time()
        self.patience_seconds = patience_seconds
        self.in_flight = 0
        self.window = 0
        self.restarts = 0
        self.requests_per_second = 0.0
        self.output_tokens_per_second = 0.0
        self.engine: EngineFigures | None = None
        self.gpus: tuple[GpuFacts, ...] = ()

    def note_progress(self) -> None:
        """Take note of a sign that the work goes on: an outcome, a token, a commit."""
        self.progress_at = time.time()

    def enter(self, phase: str, *, patience_seconds: float) -> None:
        """Begin a phase, in which so long without progress is not yet stuck."""
        self.phase = phase
        self.patience_seconds = patience_seconds
        self.note_progress()
