"""Totals of a batch, accumulated request by request in bounded memory."""

from collections import Counter
from dataclasses import dataclass, field

from batch_orchestration.core.outcomes import Completion, Failure
from batch_orchestration.core.results import SIMULATED, SettledRequest

#: Enough examples to recognise a cause, few enough to read.
EXAMPLES_PER_CODE = 3


@dataclass(frozen=True, order=True)
class EngineUse:
    """An engine and model that settled requests of a batch under one set of settings."""

    engine: str
    version: str
    model: str
    settings_hash: str


@dataclass(frozen=True)
class FailureExample:
    """A failed request, without its prompt."""

    custom_id: str | None
    line: int
    message: str


@dataclass
class BatchTotals:
    """Totals of requests, tokens, failures and engines.

    Attributes:
        attempts: Total submissions; if more than `submitted`, some requests were retried.
        submitted: Number of requests sent to an engine; the others were refused at admission.
        first_at: Time of the first submission; None if there was none.
        last_at: Time of the last outcome of a submitted request; None if there was none.
    """

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 0
    submitted: int = 0
    failures_by_code: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[FailureExample]] = field(default_factory=dict)
    engines: Counter[EngineUse] = field(default_factory=Counter)
    first_at: float | None = None
    last_at: float | None = None

    def count(self, request: SettledRequest) -> None:
        """Add one request."""
        outcome = request.outcome
        self.attempts += request.attempts
        if isinstance(outcome, Completion):
            self.completed += 1
            self.prompt_tokens += outcome.usage.prompt_tokens
            self.completion_tokens += outcome.usage.completion_tokens
        else:
            self._count_failure(request, outcome)
        if request.attempts:
            self._count_submitted(request)

    @property
    def total(self) -> int:
        """Number of requests counted."""
        return self.completed + self.failed

    @property
    def failure_rate(self) -> float:
        """Share of requests that failed, 0 to 1."""
        return self.failed / self.total if self.total else 0.0

    @property
    def run_seconds(self) -> float:
        """Seconds from the first submission to the last outcome, pauses between runs included."""
        if self.first_at is None or self.last_at is None:
            return 0.0
        return self.last_at - self.first_at

    @property
    def requests_per_second(self) -> float:
        """Submitted requests per second of `run_seconds`."""
        return self.submitted / self.run_seconds if self.run_seconds else 0.0

    @property
    def output_tokens_per_second(self) -> float:
        """Completion tokens per second of `run_seconds`."""
        return self.completion_tokens / self.run_seconds if self.run_seconds else 0.0

    @property
    def simulated(self) -> bool:
        """Whether a simulated engine made up any of the answers."""
        return any(use.engine == SIMULATED for use in self.engines)

    def _count_failure(self, request: SettledRequest, failure: Failure) -> None:
        self.failed += 1
        self.failures_by_code[str(failure.code)] += 1
        examples = self.examples.setdefault(str(failure.code), [])
        if len(examples) < EXAMPLES_PER_CODE:
            examples.append(FailureExample(request.custom_id, request.line, failure.message))

    def _count_submitted(self, request: SettledRequest) -> None:
        self.submitted += 1
        by = request.provenance
        self.engines[EngineUse(by.engine, by.engine_version, by.model, by.settings_hash)] += 1
        starts = [request.settled_at - request.outcome.latency_seconds]
        starts += [attempt.at for attempt in request.failed_attempts]
        starts += [] if self.first_at is None else [self.first_at]
        self.first_at = min(starts)
        self.last_at = max(request.settled_at, self.last_at or request.settled_at)
