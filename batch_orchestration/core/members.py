"""Members: loops in which what is wrong with one leaves the others as they are.

Every loop over batches, claims, replays or files of theirs is written so:

    faults = Faults()
    for batch in batches:
        with faults.of(batch.batch_id):
            ...

What concerns everyone ends the loop all the same: a store that is locked or damaged, a disk without
room, a process that can open no file. Anything else is the fault of that one member, an exception
nobody has thought of included: a bug that one file brings to light is not to stop the other files.
"""

import errno
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from batch_orchestration.core.errors import (
    BatchOrchestrationError,
    FileDamaged,
    Shortage,
    StoreDamaged,
    StoreLocked,
)

logger = logging.getLogger(__name__)

#: No room, or no descriptor or memory left: the next member would not fare better.
_EVERYONES = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)


@dataclass(frozen=True, kw_only=True)
class MemberFault:
    """Why one member of a loop was passed over.

    Attributes:
        member: Id of the batch, or name of the file.
        reason: For people; names the path where a file is to blame.
        path: Of the file that is to blame; None if none is.
    """

    member: str
    reason: str
    path: Path | None = None

    def __str__(self) -> str:
        return f"{self.member}: {self.reason}"


class Faults:
    """What was wrong with members of loops, by member; of each the first fault."""

    def __init__(self) -> None:
        self._found: dict[str, MemberFault] = {}

    def of(self, member: str) -> AbstractContextManager[None, bool]:
        """Do something for one member; what it raises is kept here, and the loop goes on.

        What concerns every member (see this module) is raised all the same, and so is what ends a
        thread or the process.
        """
        return _Turn(self, member)

    def add(self, member: str, error: Exception) -> None:
        """Keep what was wrong with a member."""
        if not isinstance(error, BatchOrchestrationError | OSError):
            logger.warning("unexpected fault of %s", member, exc_info=error)
        path = error.path if isinstance(error, FileDamaged) else None
        reason = str(error) or type(error).__name__
        if not isinstance(error, BatchOrchestrationError):
            reason = f"{type(error).__name__}: {error}"
        fault = MemberFault(member=member, reason=reason.partition("\n")[0], path=path)
        self._found.setdefault(member, fault)

    def __contains__(self, member: object) -> bool:
        return member in self._found

    def __iter__(self) -> Iterator[MemberFault]:
        return iter(self._found.values())

    def log(self) -> None:
        """Say them all in the log: for loops of which nobody else is told."""
        for fault in self:
            logger.warning("%s is left as it is: %s", fault.member, fault.reason)


class _Turn(AbstractContextManager[None, bool]):
    """The turn of one member."""

    def __init__(self, faults: Faults, member: str) -> None:
        self._faults = faults
        self._member = member

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or concerns_everyone(error):
            return False
        self._faults.add(self._member, error)
        return True


def concerns_everyone(error: BaseException) -> bool:
    """Whether an error is no fault of the member at which it showed."""
    if isinstance(error, StoreLocked | StoreDamaged | Shortage | MemoryError):
        return True
    return isinstance(error, OSError) and error.errno in _EVERYONES
