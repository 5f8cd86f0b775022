"""The order of service: which entry gets the engine next, and why.

Higher whole points of effective priority always come first. Effective priority is the author's
priority plus one point for every `ageing_seconds` of waiting, without a limit, so nothing starves:

    B never goes before A if B arrives more than (B's priority - A's priority + 1) x ageing_seconds
    after A.

An entry therefore waits only for entries that arrived before that moment. With priorities between
-10 and 10 and 600 s per point, newcomers of the highest priority go before one of the lowest for at
most 3.5 hours.

Within a whole point, the earliest deadline comes first if deadlines bind. Otherwise the least
served source comes first, with its earliest deadline, then its earliest arrival. Deadlines bind if
one quantum for the least served source would make an entry late that the earliest-deadline order
serves in time.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from batch_orchestration.queue.entries import QueueEntry

#: Engine time of one entry before another may take its turn: about one chunk.
QUANTUM_SECONDS = 60.0


def effective_priority(
    priority: int, arrived_at: float, *, now: float, ageing_seconds: float
) -> float:
    """Return the priority plus the points gained by waiting; a clock set back takes none away."""
    return priority + max(0.0, now - arrived_at) / ageing_seconds


def whole_points(effective_priority: float) -> int:
    """Return the whole points of an effective priority, which decide before every other rule."""
    return math.floor(effective_priority)


def order(
    entries: Iterable[QueueEntry],
    *,
    now: float,
    ageing_seconds: float,
    quantum_seconds: float = QUANTUM_SECONDS,
    served: Mapping[str, float] | None = None,
) -> list[QueueEntry]:
    """Return all entries in the order of service, with place, effective priority and detail.

    The first place is exact: its entry gets the next quantum. The other places are the order of
    first quanta if nothing else happens. The order of `entries` does not matter. The reason for the
    place becomes the detail of an entry that has none yet.

    Args:
        served: Tokens that each source received recently.
    """
    levels: dict[int, list[QueueEntry]] = {}
    for entry in entries:
        effective = effective_priority(
            entry.priority, entry.arrived_at, now=now, ageing_seconds=ageing_seconds
        )
        aged = msgspec.structs.replace(entry, effective_priority=effective)
        levels.setdefault(whole_points(effective), []).append(aged)
    counters = dict(served or {})
    ordered: list[QueueEntry] = []
    clock = now
    for points in sorted(levels, reverse=True):
        level = levels[points]
        for entry, why in _level(level, counters, clock=clock, quantum_seconds=quantum_seconds):
            detail = entry.detail or f"{_points(entry, now)}; {why}"
            place = len(ordered) + 1
            ordered.append(msgspec.structs.replace(entry, place=place, detail=detail))
        clock += sum(entry.engine_seconds or 0.0 for entry in level)
    return ordered


@dataclass(kw_only=True)
class _Share:
    """An entry of a level, with the engine time that it still needs."""

    entry: QueueEntry
    left: float
    placed: bool = False


def _level(
    entries: Sequence[QueueEntry],
    served: dict[str, float],
    *,
    clock: float,
    quantum_seconds: float,
) -> Iterator[tuple[QueueEntry, str]]:
    """Yield entries with the same whole points in order, each with the rule that placed it.

    Args:
        served: Tokens by source; the tokens of each yielded entry are added.
        clock: Expected start of the level's service, for deadlines.
    """
    # In the order of deadlines. A placed entry stays, with its time left after a quantum.
    shares = [
        _Share(entry=entry, left=entry.engine_seconds or 0.0)
        for entry in sorted(entries, key=_by_deadline)
    ]
    for _ in entries:
        waiting = [share for share in shares if not share.placed]
        # Among equals, and within a source, `min` picks the first: the earliest deadline.
        fair = min(waiting, key=lambda share: served.get(share.entry.source, 0.0))
        late = _made_late(fair, shares, clock, _quantum(fair, quantum_seconds))
        chosen = fair if late is None else waiting[0]
        source = chosen.entry.source
        yield chosen.entry, _rule(chosen.entry, waiting, late, served.get(source, 0.0))
        chosen.placed = True
        spent = _quantum(chosen, quantum_seconds)
        chosen.left = max(0.0, chosen.left - spent)
        clock += spent
        served[source] = served.get(source, 0.0) + (chosen.entry.tokens or 0)


def _quantum(share: _Share, quantum_seconds: float) -> float:
    unknown = share.entry.engine_seconds is None
    return quantum_seconds if unknown else min(quantum_seconds, share.left)


def _made_late(
    fair: _Share, shares: Sequence[_Share], clock: float, quantum: float
) -> QueueEntry | None:
    """Return an entry that is late only because `fair` gets a quantum first; None if none is.

    Only entries before `fair` in the order of deadlines are delayed by that quantum.
    """
    for share in shares:
        if share is fair:
            return None
        clock += share.left
        deadline = share.entry.deadline
        if deadline is not None and clock <= deadline < clock + quantum:
            return share.entry
    return None


def _rule(
    chosen: QueueEntry, waiting: Sequence[_Share], late: QueueEntry | None, tokens: float
) -> str:
    """Return the rule that chose an entry among those that wait, in words."""
    if late is not None:
        return f"earliest deadline, else {late.id} would be late"
    if len(waiting) == 1:
        return f"no later entry has {whole_points(chosen.effective_priority)} whole points"
    if len({share.entry.source for share in waiting}) == 1:
        return f"earliest deadline of source {chosen.source}, or the first to arrive"
    return f"source {chosen.source} has received the fewest tokens lately ({tokens:,.0f})"


def _points(entry: QueueEntry, now: float) -> str:
    minutes = max(0.0, now - entry.arrived_at) / 60
    effective = entry.effective_priority
    return f"priority {entry.priority} and {minutes:.0f} min of waiting make {effective:.1f}"


def _by_deadline(entry: QueueEntry) -> tuple[float, float, str]:
    deadline = math.inf if entry.deadline is None else entry.deadline
    return deadline, entry.arrived_at, entry.id
