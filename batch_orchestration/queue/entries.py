"""The public view of the queue: entries, their places, blockers and expected times."""

from enum import StrEnum

import msgspec

from batch_orchestration.queue.demand import Demand


class WaitReason(StrEnum):
    """Why a queue entry cannot go on now.

    `paused` and `failure_rate` wait for a person; every other reason clears by itself.
    """

    #: The limit on unfinished batches is reached.
    QUEUE_FULL = "queue_full"
    #: The entry would exceed the limit on queued requests.
    REQUESTS_QUEUED = "requests_queued"
    #: The entry would exceed the limit on queued tokens, which are expected ones.
    TOKENS_QUEUED = "tokens_queued"
    #: Input and expected output would not leave the disk reserve.
    DISK_LOW = "disk_low"
    #: The device is not fit for work.
    GPU_UNHEALTHY = "gpu_unhealthy"
    #: The engine refuses every request, because of a key, a quota or a proxy.
    ENGINE_REFUSES_US = "engine_refuses_us"
    #: A person has paused the queue and must resume it.
    PAUSED = "paused"
    #: The batch is paused because too many of its requests fail.
    FAILURE_RATE = "failure_rate"
    #: The source has exceeded its submission rate.
    SUBMISSION_RATE = "submission_rate"
    #: The file may still be being written.
    SETTLING = "settling"


class EntryKind(StrEnum):
    """The kind of a queue entry."""

    #: A dropped file that is still in the inbox.
    FILE = "file"
    #: An admitted, unfinished batch.
    BATCH = "batch"


class EntryState(StrEnum):
    """The stage of a queue entry."""

    WAITING = "waiting"
    #: Admitted, without a run at work.
    ADMITTED = "admitted"
    RUNNING = "running"


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """A person's decision to pause the queue.

    Attributes:
        release_gpu: Whether engines are ended as soon as no run uses them.
    """

    at: float
    actor: str
    reason: str = ""
    release_gpu: bool = False


class QueueEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A batch or file in the queue.

    Attributes:
        id: Batch id, or the file's path within the inbox.
        batch_id: None until the file is admitted.
        source: The submitter.
        priority: The author's priority.
        effective_priority: The priority plus the points gained by waiting.
        arrived_at: When the file arrived in the inbox.
        deadline: End of the completion window; for a file, if it were admitted on arrival.
        reason: Why the entry cannot go on now; None if it only waits for its place.
        detail: A sentence with numbers that explains the reason, or the place.
        place: Position in the order of service, from 1.
        claimed: Whether the file is being read and admitted now.
        failing: Whether earlier admissions of the claimed file failed. It takes no capacity then:
            otherwise other entries would wait for as long as it fails.
        requests: None until the file is read.
        pending: Requests without an outcome.
        tokens: Expected tokens of the pending requests, prompt and answer together.
        size_bytes: Size of a file after decompression.
        new_bytes: The part of it that is not on the disk yet.
        engine_seconds: Estimated engine time that is left; None without an estimate.
        expected_start: None without an estimate, as is `expected_end`.
        settings_hash: Hash of the settings that answers depend on. Batches with equal hashes can
            share an engine.
    """

    kind: EntryKind
    id: str
    batch_id: str | None = None
    source: str
    priority: int
    effective_priority: float = 0.0
    arrived_at: float = 0.0
    deadline: float | None = None
    state: EntryState
    reason: WaitReason | None = None
    detail: str = ""
    place: int = 0
    claimed: bool = False
    failing: bool = False
    requests: int | None = None
    pending: int | None = None
    tokens: int | None = None
    size_bytes: int = 0
    new_bytes: int = 0
    engine_seconds: float | None = None
    expected_start: float | None = None
    expected_end: float | None = None
    settings_hash: str = ""

    @property
    def demand(self) -> Demand:
        """The capacity that the entry needs."""
        return Demand(
            requests=self.pending,
            tokens=self.tokens,
            size_bytes=self.size_bytes,
            new_bytes=self.new_bytes,
        )

    @property
    def unclaimed(self) -> bool:
        """Whether the entry is a file that waits for admission."""
        return self.state is EntryState.WAITING and not self.claimed

    @property
    def admissible(self) -> bool:
        """Whether the entry is a file that may be claimed now."""
        return self.unclaimed and self.reason is None


class QueueView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole queue at one moment, in the order of service."""

    at: float
    paused: Pause | None = None
    entries: tuple[QueueEntry, ...] = ()


class NeedsAttention(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that cannot go on until a person acts.

    Attributes:
        batch_id: The batch id; the file name before admission.
        run_id: The run whose page shows the cause; empty if a file is the cause.
        reason: The cause, and the action that lets the batch go on.
    """

    batch_id: str
    run_id: str
    reason: str
