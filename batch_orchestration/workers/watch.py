"""Watches the workers of runs: how long each has been quiet, by the observer's own clock.

No clock of the worker is compared with one of ours: what counts is for how long its heartbeat, its
progress and its event loop have not changed while we looked. Between two looks at most
`LONGEST_STEP_SECONDS` count, so that nobody is judged by time in which the observer did not look
either: a machine that was suspended, a container that was frozen, a clock that was set. A worker
that was suspended along with us speaks up within seconds, long before it counts as silent. For the
same reason an observer that was started anew begins to count from nothing.
"""

import time
from collections.abc import Callable

from batch_orchestration.workers.heartbeat import (
    IdleTimes,
    LastHeartbeat,
    WorkerHealth,
    judge_worker,
)

#: Dagster's monitoring looks every 5 s, and somewhat later where there are many runs.
LONGEST_STEP_SECONDS = 15.0
FORGET_SECONDS = 3600.0


class WorkerWatch:
    """Judges workers by what it has seen of them from look to look.

    Args:
        silent_seconds: Without a heartbeat for so long, a worker is silent.
        clock: Monotonic seconds.
    """

    def __init__(
        self, *, silent_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._silent_seconds = silent_seconds
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def look(self, run_id: str, last_heartbeat: LastHeartbeat | None) -> WorkerHealth:
        """Look at a worker's pulse and judge it."""
        now = self._clock()
        seen = self._seen.setdefault(run_id, _Seen(now))
        seen.take_in(last_heartbeat, now)
        # Of runs that have ended nobody asks any more.
        self._seen = {
            asked: seen
            for asked, seen in self._seen.items()
            if now - seen.looked_at < FORGET_SECONDS
        }
        return judge_worker(last_heartbeat, seen.quiet, silent_seconds=self._silent_seconds)


class _Seen:
    def __init__(self, now: float) -> None:
        self.looked_at = now
        self._heartbeat = Unchanged()
        self._progress = Unchanged()
        self._loop = Unchanged()

    def take_in(self, last_heartbeat: LastHeartbeat | None, now: float) -> None:
        step = min(now - self.looked_at, LONGEST_STEP_SECONDS)
        self.looked_at = now
        self._heartbeat.take_in(None if last_heartbeat is None else last_heartbeat.at, step)
        told = None if last_heartbeat is None else last_heartbeat.told
        if told is not None:  # else there is no news of these, good or bad
            # A phase that begins counts as progress, and its patience counts from then.
            self._progress.take_in((told.progress_at, told.phase), step)
            self._loop.take_in(told.loop_at, step)

    @property
    def quiet(self) -> IdleTimes:
        return IdleTimes(
            heartbeat=self._heartbeat.seconds,
            progress=self._progress.seconds,
            loop=self._loop.seconds,
        )


class Unchanged:
    """For how long something has not changed, by the steps between the looks at it."""

    def __init__(self) -> None:
        self._last: object = None
        self.seconds = 0.0

    def take_in(self, value: object, step: float) -> None:
        """Look at it, so many seconds after the last look."""
        self.seconds = self.seconds + step if value == self._last else 0.0
        self._last = value
