"""Monitors run workers: how long each has been quiet, by the observer's own clock.

Quiet times are measured on the observer's monotonic clock only (`core.waiting.IdleClock`), so the
clocks of workers never matter: they are the times for which the heartbeat, the progress and the
event loop of a worker have not changed from check to check. A worker that was suspended along with
its observer writes a heartbeat within seconds, long before it counts as silent. For that reason, a
restarted observer counts from 0.
"""

import time
from collections.abc import Callable

from batch_orchestration.core.waiting import IdleClock
from batch_orchestration.workers.heartbeat import (
    IdleTimes,
    LastHeartbeat,
    WorkerHealth,
    judge_worker,
)

#: Dagster's monitoring checks every 5 s, and somewhat less often if there are many runs.
LONGEST_STEP_SECONDS = 15.0
FORGET_SECONDS = 3600.0


class WorkerWatch:
    """Judges workers by their changes from check to check.

    Args:
        silent_seconds: A worker without a heartbeat for this long is silent.
        clock: Monotonic seconds.
    """

    def __init__(
        self, *, silent_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._silent_seconds = silent_seconds
        self._clock = clock
        self._observed: dict[str, _Observed] = {}

    def check(self, run_id: str, last_heartbeat: LastHeartbeat | None) -> WorkerHealth:
        """Judge a worker by its last heartbeat."""
        now = self._clock()
        observed = self._observed.setdefault(run_id, _Observed(now))
        observed.observe(last_heartbeat, now)
        # Runs that have ended are no longer checked.
        self._observed = {
            known: worker
            for known, worker in self._observed.items()
            if now - worker.checked_at < FORGET_SECONDS
        }
        return judge_worker(last_heartbeat, observed.idle, silent_seconds=self._silent_seconds)


class _Observed:
    def __init__(self, now: float) -> None:
        self.checked_at = now
        self._heartbeat, self._progress, self._loop = (
            IdleClock(longest_step=LONGEST_STEP_SECONDS, now=now) for _ in range(3)
        )

    def observe(self, last_heartbeat: LastHeartbeat | None, now: float) -> None:
        self.checked_at = now
        self._heartbeat.observe(None if last_heartbeat is None else last_heartbeat.at, now)
        beat = None if last_heartbeat is None else last_heartbeat.current
        if beat is not None:  # else their state is unknown
            # A new phase counts as progress, and its patience starts with it.
            self._progress.observe((beat.progress_at, beat.phase), now)
            self._loop.observe(beat.loop_at, now)

    @property
    def idle(self) -> IdleTimes:
        return IdleTimes(
            heartbeat=self._heartbeat.seconds,
            progress=self._progress.seconds,
            loop=self._loop.seconds,
        )
