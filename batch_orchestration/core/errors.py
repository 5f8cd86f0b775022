"""Exceptions: what makes the engine, the store, a file or the code unusable.

A single request that goes wrong is not here: that is a value (`core.outcomes.Failure`).

    BatchOrchestrationError
    ├── FileRefused              a dropped file of which nothing can be used
    ├── FileStillChanging        a claimed file that somebody was still writing
    ├── ClaimNotFound            no claimed file of that id
    ├── BatchNotFound            no batch of that id
    ├── PlanMismatch             settings or input are not those that the batch was planned with
    ├── AccountingError          a batch whose requests and outcomes do not add up
    ├── DeadLetterError          dead letters that cannot be replayed or discarded as asked
    ├── IllegalTransition        a batch whose status does not allow what was asked
    ├── HousekeepingBusy         somebody else cleans up at this moment
    ├── GpuUnreadable            NVML is missing, or raised
    ├── GpuUnhealthy             the gate is shut: no engine is started on this device now
    ├── AlertNotSent             a channel did not take an alert
    ├── EngineError
    │   ├── EngineStartFailed    the engine did not become ready
    │   ├── EngineDied           the engine is gone; what was in flight is unanswered
    │   ├── EngineSick           the engine lives and fails nearly everything it is given
    │   │   └── EngineKeepsDying it dies whatever it is asked
    │   ├── EngineRefusesUs      the engine, or what stands before it, does not let us in
    │   └── CalibrationFailed    the engine answers nothing that it is to be measured by
    └── StorageError
        ├── Shortage             something has run out for now; nothing was recorded
        │   ├── DiskFull         make room, and what waits goes on
        │   └── TooManyOpenFiles this process, or the machine, has no descriptor left
        ├── FileDamaged          one small file of ours cannot be read; others are as they were
        ├── JournalInUse         another process is writing this journal
        ├── OutboxUnwritable     output and error files cannot be written
        ├── JournalError         a second outcome, or a record that could not be read back
        │   └── UnstorableRecord the latter
        ├── OutcomeMismatch      a chunk's outcomes are not one-to-one with its requests
        ├── StoreLocked          the DuckDB file stayed locked past the deadline
        └── StoreDamaged         the DuckDB file cannot be read; `recover` makes it anew
"""

from enum import StrEnum
from pathlib import Path

import msgspec


class MemoryShortage(StrEnum):
    """What memory was too short for."""

    #: An allocation while the engine warmed up or computed, on device or host; or the kernel
    #: killed it for want of memory.
    WORK = "work"
    #: The KV cache: it does not hold one request of the longest length that is served.
    CACHE = "cache"
    #: The share of the memory that the engine claims as it starts; others hold some of it.
    CLAIM = "claim"
    #: The model itself. No setting of the ladder makes it smaller.
    WEIGHTS = "weights"


class Exhaustion(msgspec.Struct, frozen=True, kw_only=True):
    """That an engine ran out of memory, and how we know.

    Attributes:
        evidence: The line of its log, or what the kernel counted.
        max_model_len: The context in force, if the evidence tells.
    """

    shortage: MemoryShortage
    evidence: str
    max_model_len: int | None = None


class BatchOrchestrationError(Exception):
    """Base of every exception that this package raises on purpose."""


class FileRefused(BatchOrchestrationError):
    """Nothing in the file can be used."""


class FileStillChanging(BatchOrchestrationError):
    """The file changed while it was read; it is not complete yet."""


class ClaimNotFound(BatchOrchestrationError):
    """No claimed file has this id, and none ever had."""


class BatchNotFound(BatchOrchestrationError):
    """No batch has this id."""


class PlanMismatch(BatchOrchestrationError):
    """The settings or the kept input differ from those that the batch was planned with."""


class AccountingError(BatchOrchestrationError):
    """A request of the batch has no outcome, or more than one."""


class DeadLetterError(BatchOrchestrationError):
    """The dead letters cannot be replayed or discarded as asked; nothing was changed."""


class IllegalTransition(BatchOrchestrationError):
    """The status of the batch does not allow what was asked; nothing was changed."""


class HousekeepingBusy(BatchOrchestrationError):
    """Somebody else cleans up at this moment."""


class GpuUnreadable(BatchOrchestrationError):
    """What the GPUs are like could not be read; nothing may be concluded from that.

    Attributes:
        lost: If a device has fallen off the bus: its place among the visible ones.
    """

    def __init__(self, message: str, *, lost: int | None = None) -> None:
        super().__init__(message)
        self.lost = lost


class GpuUnhealthy(BatchOrchestrationError):
    """Something speaks against starting an engine on the device now; it waits, nothing failed."""


class AlertNotSent(BatchOrchestrationError):
    """A channel did not take an alert; the message holds no secret.

    Attributes:
        partly: Whether some of those who are to have it have it.
        refused: Whether it is the post that is not taken, and never will be.
    """

    def __init__(self, message: str, *, partly: bool = False, refused: bool = False) -> None:
        super().__init__(message)
        self.partly = partly
        self.refused = refused


class EngineError(BatchOrchestrationError):
    """The engine is unusable.

    Attributes:
        exhaustion: How it ran out of memory, if that is why.
    """

    def __init__(self, message: str, *, exhaustion: Exhaustion | None = None) -> None:
        super().__init__(message)
        self.exhaustion = exhaustion


class EngineStartFailed(EngineError):
    """The engine did not become ready; the message carries its last log lines."""


class EngineDied(EngineError):
    """The engine is gone, and with it everything in flight."""


class EngineSick(EngineError):
    """The engine answers, but fails nearly everything; feeding it on would only burn attempts."""


class EngineKeepsDying(EngineSick):
    """The engine dies whatever it is asked: no request is to blame, and no restart helps."""


class EngineRefusesUs(EngineError):
    """The engine, or what stands before it, refuses whatever it is asked: nothing was recorded.

    Attributes:
        page: What was refused: an endpoint, or the page that lists the models.
        model: Named in the request that was refused; None for the page.
        status: HTTP status of the refusal.
        line: First line of what was said with it, fit to be shown.
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
    """The engine answers nothing that it is asked to be measured by."""


class StorageError(BatchOrchestrationError):
    """The journal or the store is unusable."""


class Shortage(StorageError):
    """Something has run out for now; nothing was recorded, and trying again later is safe."""


class DiskFull(Shortage):
    """There is no room to write."""


class TooManyOpenFiles(Shortage):
    """This process, or the machine, has as many files open as it may."""


class FileDamaged(StorageError):
    """A small file of ours is emptied, torn, of another kind, or cannot be read.

    Attributes:
        path: Of the file.
        reason: What is wrong with it, as the rest of a sentence that begins with the path.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path
        self.reason = reason


class JournalInUse(StorageError):
    """Another process is writing this journal."""


class JournalError(StorageError):
    """A record would give a request a second outcome, or could not be read back."""


class UnstorableRecord(JournalError):
    """A record could not be read back: what it says of a request has to be said otherwise."""


class OutcomeMismatch(StorageError):
    """The outcomes of a chunk are not one-to-one with its requests; nothing was committed."""


class OutboxUnwritable(StorageError):
    """Output and error files cannot be written; the answers are safe in the store."""


class StoreLocked(StorageError):
    """Another process kept the DuckDB file locked past the deadline."""


class StoreDamaged(StorageError):
    """The DuckDB file cannot be read; it is left as it is for `recover` to set aside."""
