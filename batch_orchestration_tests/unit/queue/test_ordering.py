"""The order of service: priority with ageing, then deadlines where they bind, then fair share."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry
from batch_orchestration.queue.ordering import QUANTUM_SECONDS, order, whole_points
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.queue_simulation import starvation_bound

AGEING = 600.0
HOUR = 3600.0


def entry(
    name: str,
    *,
    source: str = "inbox",
    waited: float = 0.0,
    due: float | None = None,
    **fields: Any,
) -> QueueEntry:
    """A file that arrived so many seconds ago; `due` is its deadline in seconds from now."""
    values: dict[str, Any] = {
        "kind": EntryKind.FILE,
        "id": name,
        "source": source,
        "priority": 0,
        "state": EntryState.WAITING,
        "arrived_at": NOW - waited,
        "deadline": None if due is None else NOW + due,
    }
    return QueueEntry(**{**values, **fields})


def ids(entries: Sequence[QueueEntry]) -> list[str]:
    return [entry.id for entry in entries]


def ordered(*entries: QueueEntry, served: dict[str, float] | None = None) -> list[str]:
    return ids(order(entries, now=NOW, ageing_seconds=AGEING, served=served))


def test_higher_priority_comes_first() -> None:
    low, high = entry("low", priority=-1, waited=30), entry("high", priority=1)

    assert ordered(low, high) == ["high", "low"]


def test_waiting_makes_up_for_priority() -> None:
    old = entry("old", waited=10 * 600)
    high = entry("high", priority=9)

    assert ordered(high, old) == ["old", "high"]


def test_within_a_source_the_earliest_deadline_then_the_first_to_arrive_comes_first() -> None:
    later = entry("later", waited=20)
    first = entry("first", waited=30)
    due = entry("due", due=HOUR)

    assert ordered(later, first, due) == ["due", "first", "later"]


def test_sources_of_equal_priority_take_turns_by_what_they_got() -> None:
    """The second of `a` waits until `b` has got as much as the first of `a`."""
    candidates = [
        entry("a1", source="a", tokens=100, waited=9),
        entry("a2", source="a", tokens=100, waited=8),
        entry("b1", source="b", tokens=60, waited=7),
        entry("b2", source="b", tokens=60, waited=6),
        entry("b3", source="b", tokens=60, waited=5),
    ]

    assert ordered(*candidates) == ["a1", "b1", "b2", "a2", "b3"]
    assert ordered(*candidates, served={"a": 1000})[:3] == ["b1", "b2", "b3"]


def test_who_was_served_least_waits_where_a_deadline_would_be_missed() -> None:
    urgent = entry("urgent", source="a", due=100, engine_seconds=90)
    fair = entry("fair", source="b", engine_seconds=500)

    first, second = order([fair, urgent], now=NOW, ageing_seconds=AGEING, served={"a": 10})

    assert (first.id, second.id) == ("urgent", "fair")
    assert "else urgent would be late" in first.detail


@pytest.mark.parametrize(
    ("due", "why"),
    [(200, "there is time for both"), (80, "it is too late anyway"), (None, "it has no deadline")],
)
def test_a_deadline_that_does_not_bind_is_no_reason_to_be_unfair(
    due: float | None, why: str
) -> None:
    candidate = entry("urgent", source="a", due=due, engine_seconds=90)
    fair = entry("fair", source="b", engine_seconds=500)

    assert ordered(candidate, fair, served={"a": 10})[0] == "fair", why


def test_a_deadline_binds_for_what_comes_before_it_in_the_order_of_deadlines_too() -> None:
    """One quantum fits before `first`, but not before `second`, which waits for `first`."""
    first = entry("first", source="a", due=200, engine_seconds=90)
    second = entry("second", source="a", due=201, engine_seconds=90)
    fair = entry("fair", source="b", engine_seconds=500)

    assert ordered(first, second, fair, served={"a": 10}) == ["first", "second", "fair"]


def test_an_unknown_duration_counts_as_one_quantum_and_delays_nobody_by_itself() -> None:
    unknown = entry("unknown", source="b")
    tight = entry("tight", source="a", due=100, engine_seconds=90)

    assert ordered(unknown, tight, served={"a": 10}) == ["tight", "unknown"]
    assert ordered(tight, entry("a", due=100)) == ["a", "tight"]


def test_every_place_is_explained() -> None:
    high, fair, rest = order(
        [
            entry("high", priority=2, waited=300),
            entry("a", source="a"),
            entry("b", source="b"),
        ],
        now=NOW,
        ageing_seconds=AGEING,
        served={"a": 1234, "b": 5},
    )

    assert [high.place, fair.place, rest.place] == [1, 2, 3]
    assert high.detail == (
        "priority 2 and 5 min of waiting make 2.5; no later entry has 2 whole points"
    )
    assert "source b has received the fewest tokens lately (5)" in fair.detail
    assert "no later entry has 0 whole points" in rest.detail


entries = st.lists(
    st.builds(
        entry,
        st.uuids().map(str),
        source=st.sampled_from("abc"),
        waited=st.floats(-60, 5 * HOUR),
        priority=st.integers(-3, 3),
        due=st.none() | st.floats(-10, 1000),
        engine_seconds=st.none() | st.floats(0, 300),
        tokens=st.integers(0, 1000),
    ),
    max_size=8,
    unique_by=lambda entry: entry.id,
)


@settings(deadline=None)
@given(entries, st.randoms(use_true_random=False))
def test_everybody_has_one_place_whatever_the_order_of_asking(
    asked: list[QueueEntry], shuffler: random.Random
) -> None:
    shuffled = list(asked)
    shuffler.shuffle(shuffled)

    placed = order(asked, now=NOW, ageing_seconds=AGEING)

    assert sorted(ids(placed)) == sorted(ids(asked))
    assert order(shuffled, now=NOW, ageing_seconds=AGEING) == placed
    points = [whole_points(entry.effective_priority) for entry in placed]
    assert points == sorted(points, reverse=True)


@settings(deadline=None)
@given(entries, st.floats(0, 10 * HOUR))
def test_nobody_who_arrives_after_the_bound_goes_before(
    asked: list[QueueEntry], later: float
) -> None:
    patient = entry("patient", source="a", waited=2 * HOUR, priority=-3)
    newcomers = [
        entry(
            f"new {other.id}",
            source="z",
            priority=other.priority,
            waited=2 * HOUR - 0.001 - starvation_bound(-3, other.priority, ageing_seconds=AGEING),
            due=1,
            engine_seconds=1,
        )
        for other in asked
    ]
    now = NOW + later + 10 * HOUR

    placed = order([patient, *newcomers], now=now, ageing_seconds=AGEING, served={"a": 10**9})

    assert ids(placed)[0] == "patient"


def served_in_quanta(
    asked: Sequence[QueueEntry], choose: Callable[[list[QueueEntry], float, dict[str, float]], str]
) -> dict[str, float]:
    """Serve one quantum after another by a choice made anew each time; return when each ended."""
    left = {candidate.id: candidate for candidate in asked}
    served: dict[str, float] = {}
    clock, ended = NOW, {}
    while left:
        chosen = left[choose(list(left.values()), clock, served)]
        assert chosen.engine_seconds is not None
        spent = min(QUANTUM_SECONDS, chosen.engine_seconds)
        clock += spent
        served[chosen.source] = served.get(chosen.source, 0.0) + spent
        rest = chosen.engine_seconds - spent
        if rest > 1e-6:
            left[chosen.id] = msgspec.structs.replace(
                chosen, engine_seconds=rest, tokens=round(rest)
            )
        else:
            ended[chosen.id] = clock
            del left[chosen.id]
    return ended


def by_the_order(left: list[QueueEntry], clock: float, served: dict[str, float]) -> str:
    # Everybody on one level, for as long as the scenario takes.
    return order(left, now=clock, ageing_seconds=10**9, served=served)[0].id


def by_deadline(left: list[QueueEntry], clock: float, served: dict[str, float]) -> str:
    return min(left, key=lambda entry: (entry.deadline, entry.id)).id


def by_fair_share_alone(left: list[QueueEntry], clock: float, served: dict[str, float]) -> str:
    return min(left, key=lambda entry: (served.get(entry.source, 0.0), entry.id)).id


due_entries = st.lists(
    st.builds(
        entry,
        st.uuids().map(str),
        source=st.sampled_from("abc"),
        due=st.integers(1, 900),
        engine_seconds=st.integers(1, 300),
        tokens=st.just(100),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda entry: entry.id,
)


@settings(deadline=None)
@given(due_entries)
def test_every_deadline_that_the_order_of_deadlines_keeps_is_kept(asked: list[QueueEntry]) -> None:
    def in_time(ended: dict[str, float]) -> set[str]:
        return {one.id for one in asked if ended[one.id] <= (one.deadline or 0) + 1e-6}

    kept = in_time(served_in_quanta(asked, by_deadline))

    assert kept <= in_time(served_in_quanta(asked, by_the_order))


def test_fair_share_alone_would_not_keep_them() -> None:
    """The negative control of the test above."""
    asked = [
        entry("urgent", source="a", due=200, engine_seconds=150),
        entry("big", source="b", due=900, engine_seconds=600),
    ]

    assert served_in_quanta(asked, by_the_order)["urgent"] <= NOW + 200
    assert served_in_quanta(asked, by_fair_share_alone)["urgent"] > NOW + 200


def test_where_no_deadline_binds_every_source_gets_its_share() -> None:
    asked = [
        entry("a", source="a", due=10**6, engine_seconds=6000),
        entry("b", source="b", due=10**5, engine_seconds=600),
    ]

    ended = served_in_quanta(asked, by_the_order)

    assert ended["b"] == pytest.approx(NOW + 1200, abs=QUANTUM_SECONDS)
