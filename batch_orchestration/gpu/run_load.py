"""The load of a run: the part of its state that samples and heartbeats both record."""

import msgspec

from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.gpu.facts import GpuFacts


class RunLoad(msgspec.Struct, kw_only=True):
    """The load of a run's engine and GPUs at one moment.

    Attributes:
        in_flight: Requests at the engine, including those of co-scheduled batches.
        window: Current limit of `in_flight`.
        restarts: Number of engine restarts so far, in this run.
        engine: None if it was not queried or did not answer.
        gpus: Empty if no GPU is used or none could be read.
    """

    in_flight: int = 0
    window: int = 0
    restarts: int = 0
    requests_per_second: float = 0.0
    output_tokens_per_second: float = 0.0
    engine: EngineMetrics | None = None
    gpus: tuple[GpuFacts, ...] = ()
