"""The admission decision: which entries may be admitted now, and the blocker of each other one.

Admission is strictly head first: if an entry waits for shared capacity, no later entry overtakes
it. A file that is still being written, or whose source exceeds its rate, holds up no other entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from batch_orchestration.queue.capacity import (
    Blocker,
    Demand,
    Limits,
    Load,
    check_capacity,
    rate_blocker,
)
from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry, WaitReason
from batch_orchestration.queue.rate_limits import SourceRates

_NEXT = "there is room: it is admitted next"
_BEING_READ = "is being read and admitted"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A queue entry before its decision.

    Attributes:
        entry: The public entry without place and reason; its detail explains its position.
        settling: Why the file counts as still being written; None if it is complete.
        halted: Why this batch alone is paused; None if it is not.
        claimed: Whether the file is being read and admitted now.
        failing: Previous admission errors of a claimed file. While set, the file takes no capacity:
            otherwise other entries would wait for as long as it fails.
    """

    entry: QueueEntry
    demand: Demand
    settling: str | None = None
    halted: str | None = None
    claimed: bool = False
    failing: str | None = None

    @property
    def open(self) -> bool:
        """Whether the entry waits for admission."""
        return self.entry.state is EntryState.WAITING and not self.claimed


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Limits in force and the gate of the queue.

    Attributes:
        gate: Blocker of all entries, such as a pause or an unfit device; None if there is none.
    """

    limits: Limits
    gate: Blocker | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """All entries with their reasons, and the ids of those that may be admitted now."""

    entries: tuple[QueueEntry, ...]
    admissible: tuple[str, ...]


def decide(
    queue: Sequence[Standing], *, load: Load, rates: SourceRates, rules: Rules, now: float
) -> Decision:
    """Decide for each entry whether it can go on now.

    Args:
        queue: All entries, in the order of service.
        load: Load of the unfinished batches.
        rates: Recent submissions of the sources.
    """
    walk = _Walk(load, rates, rules, now)
    for standing in queue:
        if standing.claimed and standing.failing is None:
            walk.count(standing)
    entries = [walk.next(standing, place) for place, standing in enumerate(queue, start=1)]
    return Decision(entries=tuple(entries), admissible=tuple(walk.admissible))


class _Walk:
    """One pass from the head of the queue to its end that counts the entries it admits."""

    def __init__(self, load: Load, rates: SourceRates, rules: Rules, now: float) -> None:
        self._load = load
        self._rates = rates
        self._rules = rules
        self._now = now
        self._head: tuple[str, Blocker] | None = None
        self.admissible: list[str] = []

    def next(self, standing: Standing, place: int) -> QueueEntry:
        """Return the next entry with its place and reason."""
        blocker, detail = self._obstacle(standing), standing.entry.detail
        if standing.claimed:
            detail = standing.failing or _BEING_READ
        elif standing.open and blocker is None:
            self.count(standing)
            self.admissible.append(standing.entry.id)
            detail = _NEXT
        return msgspec.structs.replace(
            standing.entry,
            place=place,
            reason=blocker.reason if blocker else None,
            detail=blocker.detail if blocker else detail,
        )

    def count(self, standing: Standing) -> None:
        """Add an entry that the load and the rates do not include yet."""
        known = standing.demand.requests is not None
        demand = standing.demand.guessed(self._rules.limits)
        self._load = self._load.plus(demand, self._rules.limits)
        self._load = replace(self._load, guessed=self._load.guessed or not known)
        if standing.entry.kind is EntryKind.FILE:
            source, requests = standing.entry.source, demand.requests or 0
            self._rates = self._rates.plus(source, requests, now=self._now)

    def _obstacle(self, standing: Standing) -> Blocker | None:
        if standing.halted is not None:
            return Blocker(WaitReason.FAILURE_RATE, standing.halted)
        if not standing.open:
            # A running batch finishes its run, and a claimed file is already being read.
            return self._rules.gate if standing.entry.state is EntryState.ADMITTED else None
        if standing.settling is not None:
            return Blocker(WaitReason.SETTLING, standing.settling)
        return self._rules.gate or self._rate(standing) or self._room(standing)

    def _rate(self, standing: Standing) -> Blocker | None:
        source, requests = standing.entry.source, standing.demand.requests
        return rate_blocker(self._rates, source, requests, now=self._now)

    def _room(self, standing: Standing) -> Blocker | None:
        if self._head is not None:
            head_id, blocker = self._head
            return Blocker(blocker.reason, f"comes after {head_id}; {blocker.detail}")
        demand = standing.demand
        if self._load.guessed:
            # Otherwise the entry could take capacity that entries ahead of it turn out to need.
            demand = demand.guessed(self._rules.limits)
        found = check_capacity(demand, self._load, self._rules.limits)
        if found is not None:
            if self._load.guessed:
                found = found._replace(detail=f"{found.detail}; some are only guessed so far")
            self._head = (standing.entry.id, found)
        return found
