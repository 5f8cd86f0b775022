"""Heartbeats: the state that a run worker reports every few seconds, and its assessment."""

from enum import StrEnum

import msgspec

from batch_orchestration.workers.run_status import RunStatus

#: If this many in a row are missed, that is no accident, whatever settings the worker has.
MISSED_HEARTBEATS = 3
#: A worker without a heartbeat is starting or about to end: loading all the code took 30 s on two
#: busy cores. After this long, it is neither.
FIRST_HEARTBEAT_SECONDS = 300.0


class Heartbeat(RunStatus, kw_only=True):
    """The status of a run at one moment, and its worker.

    Attributes:
        job: Dagster's name of the job.
        pid: Unique with `started` (clock ticks from boot) and `boot_id`.
        at: When this was written: a thread of the worker was alive then.
        every_seconds: Between two heartbeats, by the settings with which the worker was started.
    """

    # Without defaults: a heartbeat that lacks one of them is damaged, not alive.
    phase: str
    progress_at: float
    patience_seconds: float
    run_id: str
    job: str
    pid: int
    started: int
    boot_id: str
    at: float
    every_seconds: float = 5.0


class LastHeartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """The latest heartbeat of a worker, as found on disk.

    Attributes:
        at: Time of the latest heartbeat, even of one that could not be written.
        heartbeat: The latest one that could be written; None if it is unreadable.
        outdated: The worker lives and could not write a newer one: its progress is unknown.
    """

    at: float
    heartbeat: Heartbeat | None = None
    outdated: bool = False

    @property
    def current(self) -> Heartbeat | None:
        """The heartbeat if it is the latest; None if the latest could not be written."""
        return None if self.outdated else self.heartbeat


class IdleTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds without any change, by a clock that the observer chooses.

    Attributes:
        heartbeat: Since the last heartbeat, or since none was found.
        progress: Since the last sign of progress.
        loop: Since the event loop last came round.
    """

    heartbeat: float
    progress: float = 0.0
    loop: float = 0.0


class WorkerState(StrEnum):
    """The state of a worker whose process exists."""

    ALIVE = "alive"
    #: The process exists but writes no heartbeat: it is stopped, or blocked as a whole.
    SILENT = "silent"
    #: Heartbeats arrive, but the work does not advance. Slow work is not stuck.
    STUCK = "stuck"


class WorkerHealth(msgspec.Struct, frozen=True):
    """A worker's state, and the figures behind it."""

    state: WorkerState
    reason: str


def judge_worker(
    last_heartbeat: LastHeartbeat | None, idle: IdleTimes, *, silent_seconds: float
) -> WorkerHealth:
    """Distinguish a worker that is alive, however slow, from one that is silent or stuck.

    Work that advances is slow at most: each outcome, token and commit counts, and each check of a
    known reason to wait. Each heartbeat contains the longest acceptable pause between two of them,
    derived from the engine's behavior so far and from the limits of the worker's waits.

    Args:
        last_heartbeat: None if there is none.
        quiet: How long it has not changed.
        silent_seconds: This long without a heartbeat is no accident. The same holds for the event
            loop, which comes round every second.
    """
    if last_heartbeat is None:
        if idle.heartbeat > FIRST_HEARTBEAT_SECONDS:
            return _silent(f"it has written no heartbeat for {idle.heartbeat:.0f} s")
        return WorkerHealth(WorkerState.ALIVE, "it has not written a heartbeat yet")
    beat = last_heartbeat.current
    doing = "" if beat is None else f" while {beat.phase} ({beat.in_flight} in flight)"
    if beat is not None:
        silent_seconds = max(silent_seconds, MISSED_HEARTBEATS * beat.every_seconds)
    if idle.heartbeat > silent_seconds:
        return _silent(f"its last heartbeat was {idle.heartbeat:.0f} s ago{doing}")
    if beat is None:
        return WorkerHealth(WorkerState.ALIVE, "it is alive, but cannot write its heartbeat")
    if beat.loop_at is not None and idle.loop > silent_seconds:
        return _stuck(f"its event loop has been blocked for {idle.loop:.0f} s{doing}")
    if idle.progress > beat.patience_seconds:
        return _stuck(
            f"no outcome, token or commit for {idle.progress:.0f} s{doing};"
            f" {beat.patience_seconds:.0f} s would only be slow"
        )
    return WorkerHealth(WorkerState.ALIVE, f"last progress {idle.progress:.0f} s ago{doing}")


def _silent(reason: str) -> WorkerHealth:
    return WorkerHealth(WorkerState.SILENT, reason)


def _stuck(reason: str) -> WorkerHealth:
    return WorkerHealth(WorkerState.STUCK, reason)
