"""Loops in which a fault of one member does not affect the others.

Every loop over batches, claims, replays or their files has this form:

    faults = Faults()
    for batch in batches:
        with faults.of(batch.batch_id):
            ...

An error that concerns every member still ends the loop: a store that is locked or damaged, a full
disk, a process that cannot open files. Any other exception is a fault of that member, unexpected
exceptions included: a bug triggered by one file must not stop the other files.
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

#: No space, descriptor or memory left: the next member would fail alike.
_EVERYONES = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)


@dataclass(frozen=True, kw_only=True)
class MemberFault:
    """Why one member of a loop was skipped.

    Attributes:
        member: Id of the batch, or name of the file.
        reason: Text for people; includes the path if a file is at fault.
        path: The file at fault; None if there is none.
    """

    member: str
    reason: str
    path: Path | None = None

    def __str__(self) -> str:
        return f"{self.member}: {self.reason}"


class Faults:
    """The first fault of each member, collected over one or more loops."""

    def __init__(self) -> None:
        self._found: dict[str, MemberFault] = {}

    def of(self, member: str) -> AbstractContextManager[None, bool]:
        """Return a context for one member: an exception is recorded here, and the loop continues.

        Errors that concern every member (see this module) propagate, as do exceptions that end a
        thread or the process.
        """
        return _Turn(self, member)

    def add(self, member: str, error: Exception) -> None:
        """Record a member's fault, unless it already has one."""
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
        """Log every fault, for loops that report their faults nowhere else."""
        for fault in self:
            logger.warning("%s is left as it is: %s", fault.member, fault.reason)


class _Turn(AbstractContextManager[None, bool]):
    """The iteration of one member."""

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
    """Whether an error concerns every member, not only the one that raised it."""
    if isinstance(error, StoreLocked | StoreDamaged | Shortage | MemoryError):
        return True
    return isinstance(error, OSError) and error.errno in _EVERYONES
