"""The admission decision: which entries may be admitted now, and the blocker of each other one.

Admission is strictly head first: if an entry waits for shared capacity, no later entry overtakes
it. A file that is still being written, or whose source exceeds its rate, holds up no other entry.
"""

from collections.abc import Sequence
from dataclasses import replace

import msgspec

from batch_orchestration.queue.capacity import Blocker, Load, check_capacity, rate_blocker
from batch_orchestration.queue.demand import Limits
from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry
from batch_orchestration.queue.rate_limits import SourceRates


def decide(
    queue: Sequence[QueueEntry],
    *,
    load: Load,
    rates: SourceRates,
    limits: Limits,
    gate: Blocker | None = None,
    now: float,
) -> tuple[QueueEntry, ...]:
    """Return all entries with their blockers; those that may be admitted now are `admissible`.

    Args:
        queue: All entries, in the order of service. One that has a reason to wait keeps it.
        load: Load of the unfinished batches.
        rates: Recent submissions of the sources.
        gate: Blocker of all entries, such as a pause or an unfit device; None if there is none.
    """
    walk = _Walk(load, rates, limits, gate, now)
    for entry in queue:
        if entry.claimed and not entry.failing:
            walk.count(entry)
    return tuple([walk.next(entry) for entry in queue])


class _Walk:
    """One pass from the head of the queue to its end that counts the entries it admits."""

    def __init__(
        self, load: Load, rates: SourceRates, limits: Limits, gate: Blocker | None, now: float
    ) -> None:
        self._load = load
        self._rates = rates
        self._limits = limits
        self._gate = gate
        self._now = now
        self._head: tuple[str, Blocker] | None = None

    def next(self, entry: QueueEntry) -> QueueEntry:
        """Return the next entry with its reason."""
        if entry.reason is not None:
            return entry
        if (blocker := self._blocker(entry)) is not None:
            reason, detail = blocker
            return msgspec.structs.replace(entry, reason=reason, detail=detail)
        if not entry.unclaimed:
            return entry
        self.count(entry)
        return msgspec.structs.replace(entry, detail="the queue has capacity: it is admitted next")

    def count(self, entry: QueueEntry) -> None:
        """Add an entry that the load and the rates do not include yet."""
        demand = entry.demand.guessed(self._limits)
        self._load = self._load.plus(demand, self._limits)
        self._load = replace(self._load, guessed=self._load.guessed or entry.pending is None)
        if entry.kind is EntryKind.FILE:
            self._rates = self._rates.plus(entry.source, demand.requests or 0, now=self._now)

    def _blocker(self, entry: QueueEntry) -> Blocker | None:
        if entry.unclaimed:
            rate = rate_blocker(self._rates, entry.source, entry.pending, now=self._now)
            return self._gate or rate or self._capacity(entry)
        # A running batch finishes its run, and a claimed file is already being read.
        return self._gate if entry.state is EntryState.ADMITTED else None

    def _capacity(self, entry: QueueEntry) -> Blocker | None:
        if self._head is not None:
            head_id, blocker = self._head
            return Blocker(blocker.reason, f"comes after {head_id}; {blocker.detail}")
        demand = entry.demand
        if self._load.guessed:
            # Otherwise the entry could take capacity that entries ahead of it turn out to need.
            demand = demand.guessed(self._limits)
        found = check_capacity(demand, self._load, self._limits)
        if found is not None:
            if self._load.guessed:
                found = found._replace(detail=f"{found.detail}; some are only guessed so far")
            self._head = (entry.id, found)
        return found
