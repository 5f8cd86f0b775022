"""What admission learns of a file's requests, beyond what is wrong with their lines."""

from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.core.errors import FileRefused
from batch_orchestration.core.requests import Fault, Request
from batch_orchestration.estimates.engine import EstimateSettings
from batch_orchestration.estimates.estimate import Estimate, window_warning
from batch_orchestration.estimates.estimating import Knowledge, estimate_profile
from batch_orchestration.estimates.profile import TokenProfile
from batch_orchestration.services.feasibility import Feasibility, known_limits


class Intake:
    """Looks at each usable request of one file while it is read.

    Args:
        options: Of the batch that the file will be.
        settings: Of the deployment.
        knowledge: What the store has learned of its engine.
        now: POSIX seconds.
    """

    def __init__(
        self,
        options: BatchOptions,
        *,
        settings: EstimateSettings,
        knowledge: Knowledge,
        now: float,
    ) -> None:
        self._options = options
        self._settings = settings
        self._knowledge = knowledge
        self._now = now
        limits = known_limits(settings.engine, knowledge.facts, now=now)
        self._profiler = settings.profiler(longest=limits.longest)
        self._feasibility = Feasibility(
            limits,
            overrides=settings.overrides(options),
            engine=settings.engine,
            counter=settings.counter,
        )

    @property
    def knows_costs(self) -> bool:
        """Whether the engine was ever measured."""
        return self._knowledge.throughput is not None

    def anew(self) -> "Intake":
        """Return one that knows the same and has seen nothing."""
        return Intake(
            self._options, settings=self._settings, knowledge=self._knowledge, now=self._now
        )

    def examine(self, request: Request) -> Request | Fault:
        """Take note of a request and return it, or why the engine will certainly refuse it."""
        if (fault := self._feasibility.fault_of(request)) is not None:
            return fault
        self._profiler.add(request)
        return request

    def profile(self) -> TokenProfile:
        """Return the profile of what was read so far."""
        return self._profiler.profile()

    def estimate(
        self,
        profile: TokenProfile | None = None,
        *,
        ahead_seconds: float = 0.0,
        at: float,
        seed: str = "",
    ) -> Estimate:
        """Return what the batch will take, by its profile if that was made before."""
        return estimate_profile(
            profile or self.profile(),
            self._options,
            knowledge=self._knowledge,
            settings=self._settings,
            ahead_seconds=ahead_seconds,
            at=at,
            seed=seed,
        )

    def refuse_if_too_late(self, estimate: Estimate) -> None:
        """Refuse a batch that cannot meet its completion window, if windows are strict.

        Raises:
            FileRefused: With the numbers.
        """
        if self._settings.strict_windows and estimate.cannot_meet_window:
            warning = window_warning(estimate)
            raise FileRefused(f"{warning}, and windows are strict (BATCH_STRICT_WINDOWS)")
