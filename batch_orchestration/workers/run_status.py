"""The run status: one object that the parts of a run write, and that heartbeats are made from."""

import time
from typing import Any

import msgspec

from batch_orchestration.gpu.run_load import RunLoad

#: A run's waits have limits of their own; if they are exceeded by this much, the run is stuck.
MARGIN_SECONDS = 60.0
#: A commit waits this long for a locked store before it reports that and retries (`open_store`).
COMMIT_SECONDS = 600.0
#: For work other than answering: each line, row and removal counts, and may wait for the store.
WORK_SECONDS = COMMIT_SECONDS + MARGIN_SECONDS
#: Stands for unlimited patience, since JSON has no infinity.
LONGEST_PATIENCE_SECONDS = 1e9


class RunStatus(RunLoad, kw_only=True):
    """The current state of a run. Written by several threads, each its own attributes.

    Attributes:
        phase: Current activity, such as `starting engine` or `feeding`; set by `enter`.
        primary_batch_id: Set by `begin_batch`.
        batch_id: The current batch, primary or co-scheduled; None before the first.
        chunk: The chunk begun last.
        progress_at: Time of the last sign of progress: an outcome, a token, a commit, a new phase.
        patience_seconds: This long without progress is slow but not yet stuck, given the engine's
            behavior so far.
        loop_at: When the event loop last came round; None while none is expected to.
        unthrottled_window: The limit of `in_flight` without throttling.
        derivation: How the first window of the run was derived; None if it was given.
    """

    phase: str = "starting"
    primary_batch_id: str | None = None
    batch_id: str | None = None
    chunk: int | None = None
    progress_at: float = msgspec.field(default_factory=time.time)
    patience_seconds: float = WORK_SECONDS
    loop_at: float | None = None
    unthrottled_window: int = 0
    derivation: str | None = None

    def note_progress(self) -> None:
        """Record a sign of progress: an outcome, a token, a commit.

        Waiting for a known reason (a full disk, a pause of the breaker, a device that cools) counts
        as progress, too: call this at each check of the reason.
        """
        self.progress_at = time.time()

    def enter(self, phase: str, *, patience_seconds: float) -> None:
        """Begin a phase, in which this long without progress does not count as stuck."""
        self.phase = phase
        self.patience_seconds = patience_seconds
        self.note_progress()

    def begin_batch(self, batch_id: str) -> None:
        """Record the run's primary batch."""
        self.primary_batch_id = self.batch_id = batch_id

    def begin_chunk(self, batch_id: str, number: int) -> None:
        """Record the chunk that begins now."""
        self.batch_id = batch_id
        self.chunk = number

    def load(self) -> dict[str, Any]:
        """Return the fields of a `RunLoad`, as they are now."""
        return {name: getattr(self, name) for name in RunLoad.__struct_fields__}
