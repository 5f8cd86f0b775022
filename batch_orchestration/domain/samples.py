"""A sample: what a run, its engine and its GPUs did at one moment."""

from typing import Annotated

import msgspec

from batch_orchestration.domain.gpu import GpuFacts
from batch_orchestration.engines.figures import EngineFigures

#: A moment that a calendar has: what lies outside is no sample, and no page could show it.
Moment = Annotated[float, msgspec.Meta(ge=0, lt=253_402_300_800)]


class RunSample(msgspec.Struct, frozen=True, kw_only=True):
    """One moment of a run.

    Attributes:
        at: POSIX seconds, before the year 10000.
        batch_id: The run's own batch; None before it has begun with one.
        in_flight: Requests that the engine has, those of guests included.
        window: How many it may have now.
        restarts: Of the engine so far, in this run.
        engine: None if it was not asked or did not answer.
        gpus: Empty where no GPU is used or none could be read.
    """

    at: Moment
    run_id: str
    batch_id: str | None = None
    in_flight: int = 0
    window: int = 0
    restarts: int = 0
    requests_per_second: float = 0.0
    output_tokens_per_second: float = 0.0
    engine: EngineFigures | None = None
    gpus: tuple[GpuFacts, ...] = ()
