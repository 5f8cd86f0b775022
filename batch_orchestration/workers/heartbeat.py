"""Heartbeats: what a run worker says of itself every few seconds, and what follows from it."""

from enum import StrEnum

import msgspec

from batch_orchestration.engines.figures import EngineMetrics
from batch_orchestration.gpu.facts import GpuFacts


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """A run worker at one moment. All times are POSIX seconds.

    Attributes:
        job: Dagster's name of the job.
        pid: Of the worker; with `started` (clock ticks from boot) and `boot_id` it is unique.
        at: When this was written: a thread of the worker was alive then.
        phase: What the worker does: `starting engine`, `feeding`, `committing`, …
        batch_id: The batch in hand; None before the first.
        chunk: The chunk that was begun last.
        progress_at: Last sign that the work itself goes on: an outcome, a token, a commit, a phase.
        patience_seconds: So long without such a sign is slow and not yet stuck, by what the worker
            has seen of its engine so far.
        loop_at: When its event loop last came round; None while none is to.
        every_seconds: Between two heartbeats, by the settings that the worker was started with.
        in_flight: Requests that the engine has.
        window: How many it may have now.
        restarts: Of the engine, in this run.
    """

    run_id: str
    job: str
    pid: int
    started: int
    boot_id: str
    at: float
    phase: str
    batch_id: str | None = None
    chunk: int | None = None
    progress_at: float
    patience_seconds: float
    loop_at: float | None = None
    every_seconds: float = 5.0
    in_flight: int = 0
    window: int = 0
    restarts: int = 0
    requests_per_second: float = 0.0
    output_tokens_per_second: float = 0.0
    engine: EngineMetrics | None = None
    gpus: tuple[GpuFacts, ...] = ()


class LastHeartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """What lies there of a worker's heartbeats.

    Attributes:
        at: When the latest was given, POSIX seconds.
        heartbeat: What the latest that could be written says; None if nothing can be read.
        outdated: The worker lives and could not write more: nobody knows how far its work is.
    """

    at: float
    heartbeat: Heartbeat | None = None
    outdated: bool = False

    @property
    def told(self) -> Heartbeat | None:
        """What the latest heartbeat says; None if it could only be heard."""
        return None if self.outdated else self.heartbeat


class IdleTimes(msgspec.Struct, frozen=True, kw_only=True):
    """For how many seconds nothing has changed; by which clock is the observer's business.

    Attributes:
        heartbeat: Since the last heartbeat, or since there has been none to be seen.
        progress: Since its last sign of progress.
        loop: Since its event loop last came round.
    """

    heartbeat: float
    progress: float = 0.0
    loop: float = 0.0


class WorkerState(StrEnum):
    """What becomes of a worker whose process is there."""

    ALIVE = "alive"
    #: The process lives and says nothing: it is stopped, or blocked as a whole.
    SILENT = "silent"
    #: It says that it lives, and its work does not go on. Slow work is not stuck.
    STUCK = "stuck"


class WorkerHealth(msgspec.Struct, frozen=True):
    """What a worker's heartbeats mean, and by which figures."""

    condition: WorkerState
    reason: str


#: So many in a row is no accident either, should the worker have other settings than the observer.
MISSED_HEARTBEATS = 3
#: A worker that has no heartbeat to be seen is starting, or about to end: loading all the code took
#: 30 s on two busy cores. So much later it is neither.
FIRST_HEARTBEAT_SECONDS = 300.0


def judge_worker(
    last_heartbeat: LastHeartbeat | None, quiet: IdleTimes, *, silent_seconds: float
) -> WorkerHealth:
    """Tell a worker that is alive, however slow, from one that is silent or stuck.

    Slow is whatever goes on: each outcome, token and commit counts, and each look at a reason to
    wait. How long the pause between two of them may be, the worker says itself in each heartbeat,
    from what it has seen of its engine and from the limits of what it waits for.

    Args:
        pulse: As last seen; None if there is none.
        quiet: For how long that has not changed.
        silent_seconds: So long without a heartbeat is no accident; nor is it of the event loop,
            which comes round every second.
    """
    if last_heartbeat is None:
        if quiet.heartbeat > FIRST_HEARTBEAT_SECONDS:
            return _silent(f"it has shown no heartbeat in {quiet.heartbeat:.0f} s")
        return WorkerHealth(WorkerState.ALIVE, "no heartbeat to be seen yet")
    told = last_heartbeat.told
    doing = "" if told is None else f" while {told.phase} ({told.in_flight} in flight)"
    if told is not None:
        silent_seconds = max(silent_seconds, MISSED_HEARTBEATS * told.every_seconds)
    if quiet.heartbeat > silent_seconds:
        return _silent(f"its last heartbeat was {quiet.heartbeat:.0f} s ago{doing}")
    if told is None:
        return WorkerHealth(WorkerState.ALIVE, "its heartbeat is heard; it cannot be written")
    if told.loop_at is not None and quiet.loop > silent_seconds:
        return _stuck(f"its event loop has not come round for {quiet.loop:.0f} s{doing}")
    if quiet.progress > told.patience_seconds:
        return _stuck(
            f"no outcome, token or commit for {quiet.progress:.0f} s{doing};"
            f" {told.patience_seconds:.0f} s would only be slow"
        )
    return WorkerHealth(WorkerState.ALIVE, f"last progress {quiet.progress:.0f} s ago{doing}")


def _silent(reason: str) -> WorkerHealth:
    return WorkerHealth(WorkerState.SILENT, reason)


def _stuck(reason: str) -> WorkerHealth:
    return WorkerHealth(WorkerState.STUCK, reason)
