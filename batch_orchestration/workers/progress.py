"""The progress of a batch, written every second beside the store, and the rates in it."""

from collections import deque
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.state_file import StateFile

#: A run writes its progress each second; a file older than this is not to be trusted.
STALE_SECONDS = 10.0
#: Of the rates: long enough to smooth the arrival of whole windows, short enough to follow a
#: slowdown.
WINDOW_SECONDS = 30.0
_RESTING_PHASES = frozenset({"done", "stopped"})


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """A wait before the next attempt that the engine asked for.

    Attributes:
        requests: Number of requests that wait.
        until: When the first of them is sent again.
        reason: For display.
    """

    requests: int
    until: float
    reason: str


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a batch, as seen by the run that works on it.

    Attributes:
        pid: Of the run worker.
        updated_at: If it is old, no run is working.
        phase: `starting engine`, `feeding`, `committing`, `done` or `stopped`.
        total: Requests of the batch; `completed` and `failed` have an outcome.
        eta_seconds: Until the last outcome at the current rate; None while there is no rate.
        waiting: None if the engine has asked no request to wait.
    """

    batch_id: str
    run_id: str
    pid: int
    updated_at: float
    phase: str
    total: int
    completed: int
    failed: int
    in_flight: int
    prompt_tokens: int
    completion_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    eta_seconds: float | None
    waiting: Wait | None = None

    @property
    def done(self) -> int:
        """Requests of the batch with an outcome."""
        return self.completed + self.failed

    @property
    def resting(self) -> bool:
        """Whether the run has finished its work for the batch."""
        return self.phase in _RESTING_PHASES

    def is_of_a_live_run(self, now: float) -> bool:
        """Return whether a run is at work on the batch, as far as the file shows."""
        return not self.resting and now - self.updated_at <= STALE_SECONDS


def write_progress(path: Path, progress: Progress) -> None:
    """Replace the progress file atomically.

    Not fsynced: after a power loss, the next run writes it again.
    """
    StateFile(path, Progress).write_unsynced(progress)


def read_progress(path: Path) -> Progress | None:
    """Return the last progress written; None if there is none that can be read."""
    try:
        return StateFile(path, Progress).read()
    except StorageError:
        return None


class Meter:
    """Counts outcomes and tokens, and computes their rates over the last `WINDOW_SECONDS`.

    Times are POSIX or monotonic seconds, as long as they are always of the same clock.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self._samples: deque[tuple[float, int, int]] = deque()

    @property
    def outcomes(self) -> int:
        """Completions and failures counted so far."""
        return self.completed + self.failed

    def forget_rates(self) -> None:
        """Restart the rates: the time before, such as the engine's start, was not work."""
        self._samples.clear()

    def sample(self, now: float) -> None:
        """Record the current counts; call about once a second."""
        self._samples.append((now, self.outcomes, self.completion_tokens))
        while len(self._samples) > 2 and now - self._samples[0][0] > WINDOW_SECONDS:
            self._samples.popleft()

    def rates(self) -> tuple[float, float]:
        """Return outcomes per second and completion tokens per second."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        (start, outcomes, tokens), (end, outcomes_now, tokens_now) = (
            self._samples[0],
            self._samples[-1],
        )
        seconds = end - start
        if seconds <= 0:
            return 0.0, 0.0
        return (outcomes_now - outcomes) / seconds, (tokens_now - tokens) / seconds
