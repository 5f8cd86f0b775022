"""Values of committed results: settled requests, and the figures of chunks and batches."""

from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchOptions, BatchStatus
from batch_orchestration.core.outcomes import Outcome

#: `Provenance.engine` of the simulated engine, whose answers are made up.
SIMULATED = "simulated"


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
