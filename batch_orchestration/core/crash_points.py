"""Named points at which a test kills this process or its engine by SIGKILL, or makes it hang.

Crash points do nothing unless the environment variable `CRASH_POINT` names one. `before_commit`
kills the process the first time it reaches that point, `before_commit:3` the third time, and
`before_commit:3:hang` hangs instead. The variable deliberately lacks the prefix `BATCH_`: it is not
a setting, and no deployment needs it.
"""

import os
import signal
import time
from collections.abc import Callable
from enum import StrEnum

VARIABLE = "CRASH_POINT"


class CrashPoint(StrEnum):
    """The steps of a request's life at which a crash leaves a different state behind."""

    #: The journal has no record of the submission yet.
    BEFORE_SUBMIT = "before_submit"
    #: The submission is in the journal; the engine may or may not have the request.
    AFTER_SUBMIT = "after_submit"
    #: The answer has arrived but is not on disk.
    BEFORE_OUTCOME = "before_outcome"
    #: The outcome is in the journal but not counted.
    AFTER_OUTCOME = "after_outcome"
    #: The engine died, and one more of its requests in flight is marked as suspect.
    AFTER_SUSPECT = "after_suspect"
    #: A control request is about to settle a doubt; the journal has neither doubt nor control.
    BEFORE_CONTROL = "before_control"
    #: The control has ended; its consequence is not on disk.
    AFTER_CONTROL = "after_control"
    #: The chunk's journal is complete; the store has none of its outcomes.
    BEFORE_COMMIT = "before_commit"
    #: The chunk is in the store; the run has not noticed.
    AFTER_COMMIT = "after_commit"
    #: The run has recorded the commit; Dagster has no event for it.
    BEFORE_EVENT = "before_event"
    #: The early end of the batch is on disk but not in the store.
    AFTER_EARLY_END = "after_early_end"
    #: The early end is in the store; only some of the uncommitted chunks have been committed.
    BEFORE_CLOSE_OUT = "before_close_out"
    #: The batch is paused on disk; the run does not act on it yet.
    AFTER_HALT = "after_halt"
    #: The resumption of an ended batch is on disk; nothing has followed from it yet.
    AFTER_RESUMPTION = "after_resumption"
    #: The early end has been withdrawn on disk but not in the store.
    AFTER_REOPENING = "after_reopening"
    #: All output is written and fsynced; none of it is visible.
    BEFORE_ERRORS_RENAME = "before_errors_rename"
    #: `errors.jsonl` is visible, `output.jsonl` is not.
    BEFORE_OUTPUT_RENAME = "before_output_rename"
    #: Both files are visible, the report is not.
    BEFORE_REPORT_RENAME = "before_report_rename"
    #: All three files are visible; the batch is still `finalizing` in the store.
    AFTER_RENAMES = "after_renames"


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Never return; other threads keep running."""
    while True:
        time.sleep(3600)


#: The action at the point; tests that kill the engine replace it.
accident: Callable[[], None] = die


def crash_point(point: CrashPoint) -> None:
    """Crash or hang if a test has armed this point; otherwise do nothing."""
    if _armed is not None:
        _armed.reach(point)


class _Armed:
    """An armed crash point, with the number of passes left before it triggers."""

    def __init__(self, text: str) -> None:
        name, number, how = [*text.split(":"), "", ""][:3]
        self._point = CrashPoint(name)
        self._left = int(number or 1)
        self._hangs = {"": False, "hang": True}[how]

    def reach(self, point: CrashPoint) -> None:
        if point is not self._point:
            return
        self._left -= 1
        if self._left == 0:
            hang() if self._hangs else accident()


_armed: _Armed | None = None


def arm(text: str) -> None:
    """Arm a crash point, given in the format of `CRASH_POINT`.

    Raises:
        ValueError: There is no such point, or the number is not an integer.
    """
    global _armed
    _armed = _Armed(text)


# An unknown name is an error at import.
if VARIABLE in os.environ:
    arm(os.environ[VARIABLE])
