"""Values of committed results: settled requests, the figures of chunks and batches, and totals."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchOptions, BatchStatus
from batch_orchestration.core.outcomes import Completion, Failure, Outcome

#: `Provenance.engine` of the simulated engine, whose answers are made up.
SIMULATED = "simulated"
#: Enough examples to recognise a cause, few enough to read.
EXAMPLES_PER_CODE = 3


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """The origin of an outcome: one run's pass over a chunk with one engine.

    Attributes:
        run_id: Dagster's run id, or `admission` if the request was refused before any run.
        engine: Kind of engine; empty if no engine was used.
        settings_hash: Hash of the settings in force; a forced run may differ from the batch's.
    """

    run_id: str
    engine: str = ""
    engine_version: str = ""
    model: str = ""
    settings_hash: str = ""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One failed attempt, for the history of a dead letter."""

    at: float
    code: str
    message: str


class Place(msgspec.Struct, frozen=True):
    """The location of an outcome's record. Journals are append-only, so it stays valid.

    Attributes:
        start: Offset of the record's first byte.
    """

    journal: Path
    start: int
    size_bytes: int


class SettledRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request with its outcome.

    Attributes:
        index: Position in the batch, from 0; with the batch id, the key of the request everywhere.
        line: Line number in the file, from 1.
        custom_id: None only if the line has none.
        endpoint: Empty if the line was unreadable.
        body: Body of a failed request, or the whole line if that was unreadable. Empty for a
            completion, and if the body was too large for journal or store; the kept input has it.
        attempts: Number of submissions; 0 if refused at admission.
        failed_attempts: Failed attempts before the last attempt, oldest first.
        place: Location of the outcome's record, for outcomes too large for the store.
    """

    index: int
    line: int
    custom_id: str | None
    endpoint: str
    body: bytes
    outcome: Outcome
    attempts: int
    failed_attempts: tuple[Attempt, ...]
    settled_at: float
    provenance: Provenance
    place: Place | None = None


class ChunkReport(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one committed chunk.

    Attributes:
        attempts: Total submissions; if more than `requests`, some requests were retried.
        seconds: Time from first submission to last outcome, summed over passes.
        run_id: The run that committed the chunk.
        memory_level: The engine's memory level when the chunk was completed; None if unknown, or if
            we do not control the engine's memory.
    """

    batch_id: str
    number: int
    requests: int
    completed: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    attempts: int
    seconds: float
    committed_at: float
    run_id: str
    failures_by_code: dict[str, int] = {}
    memory_level: str | None = None


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as recorded in the store; counts cover committed chunks only.

    Attributes:
        requests_per_chunk: Number of requests in each chunk; the last chunk may have fewer.
        times: Time at which each status was reached, by status word.
    """

    batch_id: str
    file_name: str
    identity: str
    status: BatchStatus
    total: int
    completed: int
    failed: int
    chunks: int
    requests_per_chunk: int
    chunks_committed: int
    prompt_tokens: int
    completion_tokens: int
    options: BatchOptions
    settings_hash: str
    model: str
    times: dict[str, float]

    @property
    def source(self) -> str:
        """The submitter."""
        return self.options.source

    @property
    def created_at(self) -> float:
        """Time of admission."""
        return self.times[BatchStatus.VALIDATING]

    @property
    def pending(self) -> int:
        """Requests without a committed outcome."""
        return self.total - self.completed - self.failed


#: Upper bounds of the latency buckets, in seconds, from the latency of an embedding to the time
#: limit of a request (`BATCH_REQUEST_TIMEOUT_SECONDS`, half an hour by default). The store keeps
#: each committed chunk's counts per bucket: changing the bounds requires a migration.
LATENCY_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


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
    """Totals of a batch, accumulated request by request in bounded memory.

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
