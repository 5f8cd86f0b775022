"""The order of service: who is next at the engine, and why.

Higher whole points of effective priority come first, always. Effective priority is the author's
priority plus one point for every `ageing_seconds` of waiting, without end, so nothing starves:

    What arrives more than (its priority - mine + 1) x ageing_seconds after me never goes before me.

So a request for service waits at most for what arrived before that moment. With priorities between
-10 and 10 and 600 s per point that is 3.5 hours for the lowest against the highest.

Within a whole point, the earliest deadline comes first where deadlines bind; else the source that
was served least comes first, and of its candidates the one with the earliest deadline, then the one
that arrived first. Deadlines bind if one quantum for the least served source would make a candidate
late that the earliest-deadline order serves in time.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, kw_only=True)
class OrderPolicy:
    """How candidates are weighed.

    Attributes:
        ageing_seconds: Of waiting, for one more point of priority.
        quantum_seconds: How long the engine serves somebody before it may be somebody else's turn:
            about one chunk.
    """

    ageing_seconds: float = 600.0
    quantum_seconds: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Somebody who wants the engine.

    Attributes:
        id: Unique among the candidates.
        source: Who submitted it.
        priority: As its author gave it.
        arrived_at: POSIX seconds, as is `deadline`.
        deadline: None if there is none.
        seconds: How long the engine still needs for it by estimate; None while that is unknown.
        work: What is left to do, in the unit in which the sources' service is counted.
    """

    id: str
    source: str
    priority: int
    arrived_at: float
    deadline: float | None = None
    seconds: float | None = None
    work: float = 0.0


class Rule(StrEnum):
    """What decided a place."""

    #: Nobody else has the same whole points of priority, or nobody else is left of them.
    PRIORITY = "priority"
    #: Its source was served least.
    FAIR_SHARE = "fair_share"
    #: All that is left with the same points is of one source.
    FIRST = "first"
    #: Its deadline would be missed if fairness decided.
    DEADLINE = "deadline"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place in the order of service; `why` is a sentence for people."""

    candidate: Candidate
    effective_priority: float
    rule: Rule
    why: str

    @property
    def points(self) -> int:
        """Whole points of effective priority: only within them do deadlines and fairness count."""
        return whole_points(self.effective_priority)


def effective_priority(
    priority: int, arrived_at: float, *, now: float, policy: OrderPolicy
) -> float:
    """Return the priority with what was gained by waiting; a clock that went back takes nothing."""
    return priority + max(0.0, now - arrived_at) / policy.ageing_seconds


def whole_points(effective_priority: float) -> int:
    """Return the part of an effective priority that decides before everything else does."""
    return math.floor(effective_priority)


def starvation_bound(priority: int, others: int, *, policy: OrderPolicy) -> float:
    """Return after how many seconds no newcomer of priority `others` goes before `priority`."""
    return max(0.0, others - priority + 1) * policy.ageing_seconds


def order(
    candidates: Iterable[Candidate],
    *,
    now: float,
    policy: OrderPolicy,
    served: Mapping[str, float] | None = None,
) -> list[Place]:
    """Return all candidates in the order of service, each with the reason for its place.

    The first place is exact: it is whose quantum is next. The others say who gets a first quantum
    after whom if nothing else happens. The order of the arguments does not matter.

    Args:
        candidates: Each id once.
        now: POSIX seconds.
        policy: How they are weighed.
        served: What each source got of late, in the unit of `Candidate.work`.
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
    """A candidate of a level, with the engine's time that it still wants there."""

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
    """Yield the places of candidates with the same whole points; `served` is carried on.

    Args:
        candidates: Of the level.
        served: By source.
        now: For ages.
        clock: When the level's service begins, for deadlines.
        policy: How they are weighed.
    """
    # In the order of deadlines; who has been placed stays, with what is left after a quantum.
    shares = [
        _Share(candidate=candidate, left=candidate.seconds or 0.0)
        for candidate in sorted(candidates, key=_by_deadline)
    ]
    for _ in candidates:
        waiting = [share for share in shares if not share.placed]
        # Of equals, and within a source, the first of them: the earliest deadline.
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
    """Return whose deadline is missed only because `fair` gets a quantum first; None if nobody's.

    In the order of deadlines only those before `fair` are put off by it.
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
