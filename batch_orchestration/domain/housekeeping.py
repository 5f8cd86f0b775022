"""Housekeeping: what was removed because of its age, and what it came to."""

from collections.abc import Mapping

import msgspec


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was removed, or would be: a batch's journals, a file, a run.

    Attributes:
        subject: Its name, for people.
        size_bytes: On the disk; 0 where nobody can tell.
    """

    subject: str
    size_bytes: int = 0


class PartResult(msgspec.Struct, frozen=True, kw_only=True):
    """What one part of housekeeping came to, the last time.

    Attributes:
        part: Its name.
        at: When it ended, POSIX seconds.
        seconds: That it took.
        removed: Things that it removed.
        size_bytes: Of these.
        off: Whether its setting says that it does nothing.
        more: Whether its time was over before it was through; it goes on the next time.
        problem: Why it ended early; None if it did not.
    """

    part: str
    at: float
    seconds: float = 0.0
    removed: int = 0
    size_bytes: int = 0
    off: bool = False
    more: bool = False
    problem: str | None = None

    @property
    def note(self) -> str:
        """What is to be said beside the numbers; usually nothing."""
        if self.off:
            return "off"
        return self.problem or ("goes on the next time" if self.more else "")


def batches_to_retire(
    keys: Mapping[str, int],
    ended: Mapping[str, float],
    *,
    before: float | None,
    most: int | None,
) -> list[str]:
    """Return the batches whose keys go from Dagster's key space, the longest ended first.

    Args:
        keys: How many keys each batch has there.
        ended: Since when those that may go at all have ended, POSIX seconds.
        before: Those that ended before that go in any case; None: none does.
        most: With more keys than that in all, further ones go until a tenth of it is free again,
            whatever their age; None: no bound.
    """
    total = sum(keys.values())
    aim = total if most is None or total <= most else most - most // 10
    retired = []
    for batch_id in sorted(ended.keys() & keys.keys(), key=lambda name: (ended[name], name)):
        if total <= aim and (before is None or ended[batch_id] >= before):
            break
        retired.append(batch_id)
        total -= keys[batch_id]
    return retired


class HouseReport(msgspec.Struct, frozen=True, kw_only=True):
    """What housekeeping came to, part by part, with the names of what went, or would.

    Attributes:
        removals: By part.
    """

    results: tuple[PartResult, ...] = ()
    removals: dict[str, list[Removal]] = {}
