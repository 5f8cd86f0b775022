"""Waiting: for a call that may never return, and for a change that may never come."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_T = TypeVar("_T")


class BackgroundCall(Generic[_T]):
    """A call in a thread of its own: a driver, a disk or a receiver may never answer.

    Nothing can end a thread that hangs: keep the call, and make no other one until it has returned.
    """

    def __init__(self, name: str, function: Callable[[], _T]) -> None:
        """Begin the call; the thread has this name."""
        self._function = function
        self._began = time.monotonic()
        self._result: _T
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def returned(self, *, within: float = 0.0) -> bool:
        """Whether the call has returned or raised, after waiting so many seconds at most."""
        self._thread.join(max(0.0, within))
        return not self._thread.is_alive()

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self._began

    def result(self) -> _T:
        """Return what the call has returned; raise what it has raised."""
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asks
            self._error = error


class IdleClock:
    """Time for which a value has not changed, by the observer's own clock.

    Each check adds `longest_step` at most, so time in which the observer did not check is ignored:
    a suspended machine, a frozen container, a clock that was set.

    Args:
        now: Monotonic seconds, as in all methods.
    """

    def __init__(self, *, longest_step: float, now: float) -> None:
        self._longest_step = longest_step
        self._checked_at = now
        self._value: object = None
        self.seconds = 0.0

    def check(self, now: float) -> float:
        """Add the time since the last check; return the time since the last change."""
        self.seconds += min(now - self._checked_at, self._longest_step)
        self._checked_at = now
        return self.seconds

    def restart(self, now: float) -> None:
        """Count from 0 again."""
        self.seconds, self._checked_at = 0.0, now

    def observe(self, value: object, now: float) -> float:
        """Check, and count from 0 again if the value is not the one observed last."""
        self.check(now)
        if value != self._value:
            self._value, self.seconds = value, 0.0
        return self.seconds
