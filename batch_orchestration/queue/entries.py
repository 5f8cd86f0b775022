"""The queue as everyone sees it: what waits, why, in which place, and when its turn is expected."""

from enum import StrEnum

import msgspec


class WaitReason(StrEnum):
    """Why something in the queue cannot go on now.

    Every reason clears itself, but `paused` and `failure_rate`: these wait for a person.
    """

    #: As many batches are unfinished as are allowed at a time.
    QUEUE_FULL = "queue_full"
    #: Together with what is queued, its requests would be more than are allowed.
    REQUESTS_QUEUED = "requests_queued"
    #: The same for the tokens that are expected of them.
    TOKENS_QUEUED = "tokens_queued"
    #: Input and expected output would not leave the reserve on the disk.
    DISK_LOW = "disk_low"
    #: The device is not fit for work.
    GPU_UNHEALTHY = "gpu_unhealthy"
    #: The engine refuses whatever it is asked: a key, a quota, a proxy.
    ENGINE_REFUSES_US = "engine_refuses_us"
    #: A person has paused the queue, and has to resume it.
    PAUSED = "paused"
    #: Too many of its requests fail: it is paused.
    FAILURE_RATE = "failure_rate"
    #: Its source has submitted more than its share of late.
    SUBMISSION_RATE = "submission_rate"
    #: Somebody may still be writing the file.
    SETTLING = "settling"


class EntryKind(StrEnum):
    """What stands in the queue."""

    #: A dropped file that is still in the inbox.
    FILE = "file"
    #: An admitted batch that is not finished.
    BATCH = "batch"


class EntryState(StrEnum):
    """How far an entry is."""

    WAITING = "waiting"
    #: Admitted; no run is at work on it.
    ADMITTED = "admitted"
    RUNNING = "running"


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody has paused the queue; `at` in POSIX seconds."""

    at: float
    actor: str
    reason: str = ""


class QueueEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One thing in the queue.

    Attributes:
        id: Batch id, or the file's path within the inbox.
        batch_id: Once there is a batch.
        source: Who submitted it.
        priority: As its author gave it.
        effective_priority: With what it has gained by waiting.
        deadline: End of its completion window, POSIX seconds; None for what has no window yet.
        reason: Why it cannot go on now; None if only its place is why.
        detail: The same as a sentence with numbers.
        place: In the order of service, from 1.
        requests: None while nobody has read the file.
        pending: Requests without an outcome.
        tokens: Expected of the pending requests, prompt and answer together.
        expected_start: POSIX seconds, as is `expected_end`; None while there is no estimate.
        settings_hash: What answers depend on; batches that agree in it can share an engine.
    """

    kind: EntryKind
    id: str
    batch_id: str | None = None
    source: str
    priority: int
    effective_priority: float
    deadline: float | None = None
    state: EntryState
    reason: WaitReason | None = None
    detail: str = ""
    place: int
    requests: int | None = None
    pending: int | None = None
    tokens: int | None = None
    expected_start: float | None = None
    expected_end: float | None = None
    settings_hash: str = ""


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole queue at one moment, in the order of service; `at` in POSIX seconds."""

    at: float
    paused: Pause | None = None
    entries: tuple[QueueEntry, ...] = ()


class NeedsAttention(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that goes on only after a person has done something.

    Attributes:
        batch_id: Of the batch; of what is not admitted yet, the name of the file.
        run_id: Of the run whose page shows the cause; empty where a file is to blame.
        reason: What happened, and what lets the batch go on.
    """

    batch_id: str
    run_id: str
    reason: str
