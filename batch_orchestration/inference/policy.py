"""The policy of a run, from the deployment's settings, and what all parts of a run share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from batch_orchestration.core.requests import Overrides
from batch_orchestration.engines.base import Engine, EngineInfo
from batch_orchestration.estimates.derivation import Derived
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.faults.retries import BreakerPolicy, RetryPolicy
from batch_orchestration.inference.window.control import Bounds
from batch_orchestration.store.store import Store
from batch_orchestration.workers.run_status import RunStatus


@dataclass(frozen=True, kw_only=True)
class RunPolicy:
    """How chunks are fed to the engine.

    Attributes:
        in_flight: Initial number of requests given to the engine at a time.
        bounds: Limits within which that number follows the engine's metrics; None if it is fixed.
        derive: Derives that number for an engine that was started.
        engine_restarts: Allowed restarts of a dead engine in one run.
        hang_seconds: Time without progress after which the engine counts as dead; a multiple of the
            longest pause so far replaces it if that is longer.
        start_timeout_seconds: Until the engine must be ready. The engine enforces this limit
            itself; here it shows when a start is late.
        answer_settings: Present settings on which answers depend; compared with each batch's plan.
        max_failure_rate: Share of failures above which a batch pauses, if its author sets none.
        guest_chunks: The most chunks of more urgent batches that a run serves beside its own.
    """

    in_flight: int
    bounds: Bounds | None = None
    derive: Callable[[EngineInfo], Derived] | None = None
    retry: RetryPolicy
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    engine_restarts: int
    hang_seconds: float = 100.0
    start_timeout_seconds: float = 900.0
    model_aliases: Mapping[str, str]
    max_tokens_cap: int | None
    answer_settings: Mapping[str, object]
    max_failure_rate: float = 0.5
    guest_chunks: int = 50

    @property
    def most_in_flight(self) -> int:
        """The most requests that may be in flight at any time."""
        return self.in_flight if self.bounds is None else self.bounds.most

    def overrides(self, model: str | None) -> Overrides:
        """Return the changes to request bodies; a given `model` answers every request."""
        return Overrides(
            model=model, aliases=self.model_aliases, max_tokens_cap=self.max_tokens_cap
        )


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The things that all parts of one run share.

    Attributes:
        policy: How requests are fed.
        status: Updated by the parts of the run.
        throttle: Returns the present throttling of the devices.
    """

    engine: Engine
    folder: DataFolder
    store: Store
    run_id: str
    policy: RunPolicy
    status: RunStatus = field(default_factory=RunStatus)
    throttle: Callable[[], Throttle] = Throttle
