"""Heartbeats: what a run worker says of itself every few seconds."""

import msgspec

from batch_orchestration.domain.engine_figures import EngineFigures
from batch_orchestration.domain.gpu import GpuFacts


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """A run worker at one moment. All times are POSIX seconds.

    Attributes:
        job: Dagster's name of the job.
        pid: Of the worker; with `started` (clock ticks from boot) and `boot_id` it is unique.
        at: When this was written: a thread of the worker was alive then.
        phase: What the worker does: `starting engine`, `feeding`, `committing`, …
        batch_id: The batch in hand; None before the first.
        chunk: The chunk that was begun last.
        progress_at: Last sign that the work itself goes on: an outcome, a token, a commit, a phase.
        patience_seconds: So long without such a sign is slow and not yet stuck, by what the worker
            has seen of its engine so far.
        loop_at: When its event loop last came round; None while none is to.
        in_flight: Requests that the engine has.
        window: How many it may have now.
        restarts: Of the engine, in this run.
    """

    run_id: str
    job: str
    pid: int
    started: int
    boot_id: str
    at: float
    phase: str
    batch_id: str | None = None
    chunk: int | None = None
    progress_at: float
    patience_seconds: float
    loop_at: float | None = None
    in_flight: int = 0
    window: int = 0
    restarts: int = 0
    requests_per_second: float = 0.0
    output_tokens_per_second: float = 0.0
    engine: EngineFigures | None = None
    gpus: tuple[GpuFacts, ...] = ()
