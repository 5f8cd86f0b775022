"""Exceptions: failures of the engine, the store, a file or the code.

The failure of a single request is not an exception but a value (`core.outcomes.Failure`).

    BatchOrchestrationError
    ├── FileRefused              nothing in a dropped file can be used
    ├── FileStillChanging        a claimed file was still being written
    ├── ClaimNotFound            no claimed file has that id
    ├── BatchNotFound            no batch has that id
    ├── PlanMismatch             settings or input differ from the batch's plan
    ├── AccountingError          a batch's requests and outcomes do not add up
    ├── DeadLetterError          the dead letters cannot be replayed or discarded as requested
    ├── IllegalTransition        the batch's status does not allow the request
    ├── HousekeepingBusy         another cleanup is running
    ├── GpuUnreadable            NVML is missing or failed
    ├── GpuUnhealthy             the GPU gate is closed: no engine is started on this device now
    ├── AlertNotSent             a channel did not accept an alert
    ├── EngineError
    │   ├── EngineStartFailed    the engine did not become ready
    │   ├── EngineDied           the engine is gone; requests in flight are unanswered
    │   ├── EngineSick           the engine runs but fails nearly every request
    │   │   └── EngineKeepsDying the engine dies whatever it is sent
    │   ├── EngineRefusesUs      the engine, or a proxy in front of it, denies us access
    │   └── CalibrationFailed    the engine answers none of the calibration requests
    └── StorageError
        ├── Shortage             a resource has run out for now; nothing was recorded
        │   ├── DiskFull         work resumes once there is space
        │   └── TooManyOpenFiles this process, or the machine, has no descriptor left
        ├── FileDamaged          one small file of ours cannot be read; other files are unaffected
        ├── JournalInUse         another process is writing this journal
        ├── OutboxUnwritable     output and error files cannot be written
        ├── JournalError         a second outcome for a request, or an unreadable record
        │   └── UnstorableRecord the record could not be read back
        ├── OutcomeMismatch      a chunk's outcomes are not one-to-one with its requests
        ├── StoreLocked          the DuckDB file stayed locked past the deadline
        ├── StoreOfOtherVersion  the DuckDB file is sound, and of another version's schema
        └── StoreDamaged         the DuckDB file cannot be read; `recover` rebuilds it
"""

from enum import StrEnum
from pathlib import Path

import msgspec


class MemoryShortage(StrEnum):
    """The use for which memory was too short."""

    #: An allocation on device or host during warm-up or inference failed, or the kernel's OOM
    #: killer ended the engine.
    WORK = "work"
    #: The KV cache cannot hold one request of the longest served length.
    CACHE = "cache"
    #: The engine's share of memory is not free at start, because other processes hold some of it.
    CLAIM = "claim"
    #: The model's weights do not fit. No memory level makes them smaller.
    WEIGHTS = "weights"


class Exhaustion(msgspec.Struct, frozen=True, kw_only=True):
    """Evidence that an engine ran out of memory.

    Attributes:
        evidence: A line of the engine's log, or the kernel's count of OOM kills.
        max_model_len: The context length in force, if the evidence contains it.
    """

    shortage: MemoryShortage
    evidence: str
    max_model_len: int | None = None


class BatchOrchestrationError(Exception):
    """Base of every exception that this package raises on purpose."""


class FileRefused(BatchOrchestrationError):
    """The file contains nothing usable."""


class FileStillChanging(BatchOrchestrationError):
    """The file changed while it was being read; it is not complete yet."""


class ClaimNotFound(BatchOrchestrationError):
    """No claimed file has this id, and none ever had."""


class BatchNotFound(BatchOrchestrationError):
    """No batch has this id."""


class PlanMismatch(BatchOrchestrationError):
    """The settings or the kept input differ from the batch's plan."""


class AccountingError(BatchOrchestrationError):
    """A request of the batch has no outcome, or more than one."""


class DeadLetterError(BatchOrchestrationError):
    """The dead letters cannot be replayed or discarded as requested; nothing was changed."""


class IllegalTransition(BatchOrchestrationError):
    """The batch's status does not allow the request; nothing was changed."""


class HousekeepingBusy(BatchOrchestrationError):
    """Another cleanup is running."""


class GpuUnreadable(BatchOrchestrationError):
    """The state of the GPUs could not be read; this does not mean that they are unhealthy.

    Attributes:
        lost: Index among the visible devices of the one that has fallen off the bus; None if none
            has.
    """

    def __init__(self, message: str, *, lost: int | None = None) -> None:
        super().__init__(message)
        self.lost = lost


class GpuUnhealthy(BatchOrchestrationError):
    """The device is not fit for starting an engine now; the run waits, and nothing has failed."""


class AlertNotSent(BatchOrchestrationError):
    """A channel did not accept an alert; the message contains no secret.

    Attributes:
        partly: Whether some of the recipients received it.
        refused: Whether the channel rejects this notification for good, so that retrying is futile.
    """

    def __init__(self, message: str, *, partly: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.partly = partly
        self.refused = refused


class EngineError(BatchOrchestrationError):
    """The engine is unusable.

    Attributes:
        exhaustion: Evidence that memory ran out, if that is the cause.
    """

    def __init__(self, message: str, *, exhaustion: Exhaustion | None = None) -> None:
        super().__init__(message)
        self.exhaustion = exhaustion


class EngineStartFailed(EngineError):
    """The engine did not become ready; the message includes its last log lines."""


class EngineDied(EngineError):
    """The engine is gone; its requests in flight are unanswered.

    Attributes:
        deliberate: Another run or a person ended it: none of our requests can be to blame.
    """

    deliberate = False


class EngineSick(EngineError):
    """The engine fails nearly every request; sending more would only use up attempts."""


class EngineKeepsDying(EngineSick):
    """The engine dies whatever it is sent: no request is at fault, and restarting does not help."""


class EngineRefusesUs(EngineError):
    """The engine, or a proxy in front of it, refuses every request: nothing was recorded.

    Attributes:
        page: The refused path: an endpoint, or the list of models.
        model: Model named in the refused request; None for the list of models.
        status: HTTP status of the refusal.
        line: First line of the refusal's text, safe to display.
    """

    def __init__(
        self, message: str, *, page: str, model: str | None = None, status: int | None, line: str
    ) -> None:
        super().__init__(message)
        self.page = page
        self.model = model
        self.status = status
        self.line = line


class CalibrationFailed(EngineError):
    """The engine answers none of the calibration requests."""


class StorageError(BatchOrchestrationError):
    """The journal or the store is unusable."""


class Shortage(StorageError):
    """A resource has run out for now; nothing was recorded, and retrying later is safe."""


class DiskFull(Shortage):
    """There is no space left to write."""


class TooManyOpenFiles(Shortage):
    """This process, or the machine, has reached its limit on open files."""


class FileDamaged(StorageError):
    """A small file of ours is empty, truncated, of the wrong kind, or unreadable.

    Attributes:
        path: The damaged file.
        reason: The damage, phrased to follow the path in a sentence.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


class JournalInUse(StorageError):
    """Another process is writing this journal."""


class JournalError(StorageError):
    """A journal rejects a record.

    The request has an outcome already, the record could not be read back, or the journal is closed.
    """


class UnstorableRecord(JournalError):
    """A record could not be read back; the caller must record a different outcome."""


class OutcomeMismatch(StorageError):
    """The outcomes of a chunk are not one-to-one with its requests; nothing was committed."""


class OutboxUnwritable(StorageError):
    """Output and error files cannot be written; the answers are safe in the store."""


class StoreLocked(StorageError):
    """Another process kept the DuckDB file locked past the deadline."""


class StoreOfOtherVersion(StorageError):
    """The DuckDB file is sound, and has the schema of another version of this package."""


class StoreDamaged(StorageError):
    """The DuckDB file cannot be read; it is left as it is for `recover` to set aside."""
