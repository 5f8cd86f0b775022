"""What is committed: requests with their outcome, and the figures of a chunk and of a batch."""

from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchOptions, BatchStatus
from batch_orchestration.core.outcomes import Outcome

#: `Provenance.engine` of the engine that makes answers up.
SIMULATED = "simulated"


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Who answered: one run's pass over a chunk with one engine.

    Attributes:
        run_id: Dagster's, or `admission` for what was refused before any run.
        engine: Kind of engine; empty if none was asked.
        settings_hash: Of the settings in force; differs from the batch's where a run was forced.
    """

    run_id: str
    engine: str = ""
    engine_version: str = ""
    model: str = ""
    settings_hash: str = ""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One failed attempt, for the history of a dead letter; `at` in POSIX seconds."""

    at: float
    code: str
    message: str


class Place(msgspec.Struct, frozen=True):
    """Where the record of an outcome is. Journals only grow, so it stays there.

    Attributes:
        journal: Path of the file.
        start: Offset of the record's first byte.
        size_bytes: Of the record.
    """

    journal: Path
    start: int
    size_bytes: int


class SettledRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request with its outcome.

    Attributes:
        index: Place in the batch, from 0; with the batch id it is the key of everything.
        line: Line number in the file, from 1.
        custom_id: None only where the line did not give one.
        endpoint: Empty where the line was unreadable.
        body: The request's body; the whole line where it was unreadable. Empty for a completion,
            and for a failure of which it was too large for journal or store: the kept input has it.
        attempts: How often it was submitted; 0 if refused at admission.
        failed_attempts: Those before the last one, oldest first.
        settled_at: POSIX seconds.
        place: Where its outcome can be read again, if the store has no room for it.
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
        attempts: Submissions in all; more than `requests` means that some were retried.
        seconds: From its first submission to its last outcome, summed over passes.
        committed_at: POSIX seconds.
        run_id: Of the run that committed it.
        memory_level: The rung of the engine's memory ladder on which the chunk was completed; None
            if that is not known, or not ours to set.
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
    """A batch as the store knows it; counts are of committed chunks only.

    Attributes:
        times: POSIX seconds at which a status was reached, by status word.
        requests_per_chunk: Of each chunk but the last, which may have fewer.
        chunks_committed: How many of `chunks` are.
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
        """Who submitted it."""
        return self.options.source

    @property
    def created_at(self) -> float:
        """When it was admitted, in POSIX seconds."""
        return self.times[BatchStatus.VALIDATING]

    @property
    def pending(self) -> int:
        """Requests without a committed outcome."""
        return self.total - self.completed - self.failed


#: Upper bounds of the latency buckets, in seconds: from an embedding to the time limit of a request
#: (`BATCH_REQUEST_TIMEOUT_SECONDS`, half an hour by default). Each committed chunk has its
#: counts by them in the store: other bounds need a migration.
LATENCY_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
