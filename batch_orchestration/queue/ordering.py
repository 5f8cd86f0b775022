"""The order of service: which candidate gets the engine next, and why.

Higher whole points of effective priority always come first. Effective priority is the author's
priority plus one point for every `ageing_seconds` of waiting, without a limit, so nothing starves:

    B never goes before A if B arrives more than (B's priority - A's priority + 1) x ageing_seconds
    after A.

A candidate therefore waits only for candidates that arrived before that moment. With priorities
between -10 and 10 and 600 s per point, newcomers of the highest priority go before one of the
lowest for at most 3.5 hours.

Within a whole point, the earliest deadline comes first if deadlines bind. Otherwise the least
served source comes first, with its earliest deadline, then its earliest arrival. Deadlines bind if
one quantum for the least served source would make a candidate late that the earliest-deadline order
serves in time.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, kw_only=True)
class OrderPolicy:
    """The parameters of the order of service.

    Attributes:
        ageing_seconds: Waiting time that adds one point of priority.
        quantum_seconds: Engine time of one candidate before another may take its turn: about one
            chunk.
    """

    ageing_seconds: float = 600.0
    quantum_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A batch or file that needs the engine.

    Attributes:
        id: Unique among the candidates.
        source: The submitter.
        priority: The author's priority.
        seconds: Estimated engine time that is left; None if unknown.
        work: Work that is left, in the unit in which the service of sources is counted.
    """

    id: str
    source: str
    priority: int
    arrived_at: float
    deadline: float | None = None
    seconds: float | None = None
    work: float = 0.0


class Rule(StrEnum):
    """The rule that decided a place."""

    #: No other candidate with the same whole points of priority is left.
    PRIORITY = "priority"
    #: The candidate's source was served least.
    FAIR_SHARE = "fair_share"
    #: All candidates left with the same whole points have one source.
    FIRST = "first"
    #: A deadline would be missed if fairness decided.
    DEADLINE = "deadline"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place in the order of service; `why` explains it in words."""

    candidate: Candidate
    effective_priority: float
    rule: Rule
    why: str

    @property
    def points(self) -> int:
        """Whole points of effective priority; deadlines and fairness only count among equals."""
        return whole_points(self.effective_priority)


def effective_priority(
    priority: int, arrived_at: float, *, now: float, policy: OrderPolicy
) -> float:
    """Return the priority plus the points gained by waiting; a clock set back takes none away."""
    return priority + max(0.0, now - arrived_at) / policy.ageing_seconds


def whole_points(effective_priority: float) -> int:
    """Return the whole points of an effective priority, which decide before every other rule."""
    return math.floor(effective_priority)


def starvation_bound(priority: int, others: int, *, policy: OrderPolicy) -> float:
    """Return the seconds after which no newcomer of priority `others` goes before `priority`."""
    return max(0.0, others - priority + 1) * policy.ageing_seconds


def order(
    candidates: Iterable[Candidate],
    *,
    now: float,
    policy: OrderPolicy,
    served: Mapping[str, float] | None = None,
) -> list[Place]:
    """Return all candidates in the order of service, each with the reason for its place.

    The first place is exact: its candidate gets the next quantum. The other places are the order of
    first quanta if nothing else happens. The order of `candidates` does not matter.

    Args:
        candidates: Candidates with unique ids.
        served: Recent service of each source, in the unit of `Candidate.work`.
    """
    levels: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        points = whole_points(_effective(candidate, now, policy))
        levels.setdefault(points, []).append(candidate)
    counters = dict(served or {})
    places: list[Place] = []
    clock = now
    for points in sorted(levels, reverse=True):
        places += _level(levels[points], counters, now=now, clock=clock, policy=policy)
        clock += sum(candidate.seconds or 0.0 for candidate in levels[points])
    return places


@dataclass(kw_only=True)
class _Share:
    """A candidate of a level, with the engine time that it still needs."""

    candidate: Candidate
    left: float
    placed: bool = False


def _level(
    candidates: Sequence[Candidate],
    served: dict[str, float],
    *,
    now: float,
    clock: float,
    policy: OrderPolicy,
) -> Iterator[Place]:
    """Yield the places of candidates with the same whole points, and add to `served`.

    Args:
        served: Service by source.
        now: The time at which effective priorities are computed.
        clock: Expected start of the level's service, for deadlines.
    """
    # In the order of deadlines. A placed candidate stays, with its time left after a quantum.
    shares = [
        _Share(candidate=candidate, left=candidate.seconds or 0.0)
        for candidate in sorted(candidates, key=_by_deadline)
    ]
    for _ in candidates:
        waiting = [share for share in shares if not share.placed]
        # Among equals, and within a source, `min` picks the first: the earliest deadline.
        fair = min(waiting, key=lambda share: served.get(share.candidate.source, 0.0))
        quantum = _quantum(fair, policy)
        late = _made_late(fair, shares, clock=clock, quantum=quantum)
        chosen = fair if late is None else waiting[0]
        rule = Rule.DEADLINE if late is not None else _rule(waiting)
        yield _place(chosen, rule, late, served, now=now, policy=policy)
        chosen.placed = True
        spent = _quantum(chosen, policy)
        chosen.left = max(0.0, chosen.left - spent)
        clock += spent
        source = chosen.candidate.source
        served[source] = served.get(source, 0.0) + chosen.candidate.work


def _rule(waiting: Sequence[_Share]) -> Rule:
    if len(waiting) == 1:
        return Rule.PRIORITY
    sources = {share.candidate.source for share in waiting}
    return Rule.FIRST if len(sources) == 1 else Rule.FAIR_SHARE


def _quantum(share: _Share, policy: OrderPolicy) -> float:
    if share.candidate.seconds is None:
        return policy.quantum_seconds
    return min(policy.quantum_seconds, share.left)


def _made_late(
    fair: _Share, shares: Sequence[_Share], *, clock: float, quantum: float
) -> Candidate | None:
    """Return a candidate that is late only because `fair` gets a quantum first; None if none is.

    Only candidates before `fair` in the order of deadlines are delayed by that quantum.
    """
    for share in shares:
        if share is fair:
            return None
        clock += share.left
        deadline = share.candidate.deadline
        if deadline is not None and clock <= deadline < clock + quantum:
            return share.candidate
    return None


def _place(
    share: _Share,
    rule: Rule,
    late: Candidate | None,
    served: Mapping[str, float],
    *,
    now: float,
    policy: OrderPolicy,
) -> Place:
    candidate = share.candidate
    effective = _effective(candidate, now, policy)
    waited = max(0.0, now - candidate.arrived_at)
    points = (
        f"priority {candidate.priority} and {waited / 60:.0f} min of waiting make {effective:.1f}"
    )
    match rule:
        case Rule.PRIORITY:
            why = f"{points}; nobody else is left with {whole_points(effective)} whole points"
        case Rule.FAIR_SHARE:
            amount = served.get(candidate.source, 0.0)
            why = f"{points}; source {candidate.source} was served least of late ({amount:,.0f})"
        case Rule.FIRST:
            why = f"{points}; of source {candidate.source} the earliest deadline, or the first"
        case Rule.DEADLINE:
            assert late is not None
            why = f"{points}; earliest deadline, else {late.id} would be late"
    return Place(candidate=candidate, effective_priority=effective, rule=rule, why=why)


def _effective(candidate: Candidate, now: float, policy: OrderPolicy) -> float:
    return effective_priority(candidate.priority, candidate.arrived_at, now=now, policy=policy)


def _by_deadline(candidate: Candidate) -> tuple[float, float, str]:
    deadline = math.inf if candidate.deadline is None else candidate.deadline
    return deadline, candidate.arrived_at, candidate.id
