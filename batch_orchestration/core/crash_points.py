"""Named places at which a test lets this process, or its engine, die by SIGKILL, or hang.

Nothing happens unless the environment variable `CRASH_POINT` names one of them: `before_commit`
dies when it is reached first, `before_commit:3` the third time, `before_commit:3:hang` does not
die, but never returns. It is no setting, and on purpose has no `BATCH_` in its name: no deployment
ever needs it.
"""

import os
import signal
import time
from collections.abc import Callable
from enum import StrEnum

VARIABLE = "CRASH_POINT"


class CrashPoint(StrEnum):
    """The steps of a request's life between which an accident makes a difference."""

    #: The journal does not know yet that it is about to be sent.
    BEFORE_SUBMIT = "before_submit"
    #: The journal knows; the engine may have it or not.
    AFTER_SUBMIT = "after_submit"
    #: The answer is there, but nowhere on disk.
    BEFORE_OUTCOME = "before_outcome"
    #: The journal has it; nobody has counted it.
    AFTER_OUTCOME = "after_outcome"
    #: The engine died, and one more of the requests that it had is marked as suspect.
    AFTER_SUSPECT = "after_suspect"
    #: Something is doubted, and a control request is about to decide; the journal knows neither.
    BEFORE_CONTROL = "before_control"
    #: The control has ended; what follows from that is nowhere on disk.
    AFTER_CONTROL = "after_control"
    #: The chunk's journal is complete; the store has nothing of it.
    BEFORE_COMMIT = "before_commit"
    #: The store has the chunk; the run does not know.
    AFTER_COMMIT = "after_commit"
    #: The run knows; Dagster does not.
    BEFORE_EVENT = "before_event"
    #: It is decided that the batch ends early; the store does not know.
    AFTER_CLOSING = "after_closing"
    #: The store knows; of the chunks without a commit, some have got theirs.
    BEFORE_CLOSE_OUT = "before_close_out"
    #: It is decided that the batch is paused; the run at work does not act on it yet.
    AFTER_HALT = "after_halt"
    #: It is decided that a batch goes on that had ended early; nothing is done yet.
    AFTER_RESUMPTION = "after_resumption"
    #: The decision to end it is taken back; the store does not know.
    AFTER_REOPENING = "after_reopening"
    #: All output is written and fsynced; none of it can be seen.
    BEFORE_ERRORS_RENAME = "before_errors_rename"
    #: `errors.jsonl` can be seen, `output.jsonl` cannot.
    BEFORE_OUTPUT_RENAME = "before_output_rename"
    #: Both can be seen, the report cannot.
    BEFORE_REPORT_RENAME = "before_report_rename"
    #: All three can be seen; the store still says that the batch is being finalized.
    AFTER_RENAMES = "after_renames"


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Never return; other threads go on."""
    while True:
        time.sleep(3600)


#: What happens at the point; a test that kills the engine instead puts that in its place.
accident: Callable[[], None] = die


def crash_point(point: CrashPoint) -> None:
    """Do nothing, unless a test has named this point."""
    if _armed is not None:
        _armed.reach(point)


class _Armed:
    """A point that was named, and how often it may still be passed unharmed."""

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
    """Let the accident happen at a point, as `CRASH_POINT` names it.

    Raises:
        ValueError: There is no such point.
    """
    global _armed
    _armed = _Armed(text)


# A name that is none of the points is an error at import.
if VARIABLE in os.environ:
    arm(os.environ[VARIABLE])
