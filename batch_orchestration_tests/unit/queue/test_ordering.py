"""The order of service: priority with ageing, then deadlines where they bind, then fair share."""

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_orchestration.queue.ordering import (
    Candidate,
    OrderPolicy,
    Place,
    Rule,
    order,
    starvation_bound,
)
from batch_orchestration_tests.support.builders import NOW

POLICY = OrderPolicy(ageing_seconds=600.0, quantum_seconds=60.0)
HOUR = 3600.0


def make_candidate(name: str, *, source: str = "inbox", waited: float = 0.0, **fields) -> Candidate:
    """A candidate that arrived so many seconds ago; `due` is its deadline in seconds from now."""
    due = fields.pop("due", None)
    return Candidate(
        **{
            "id": name,
            "source": source,
            "priority": 0,
            "arrived_at": NOW - waited,
            "deadline": None if due is None else NOW + due,
            **fields,
        }
    )


def ids(places: Sequence[Place]) -> list[str]:
    return [place.candidate.id for place in places]


def ordered(*candidates: Candidate, served: dict[str, float] | None = None) -> list[str]:
    return ids(order(candidates, now=NOW, policy=POLICY, served=served))


def test_higher_priority_comes_first() -> None:
    low, high = make_candidate("low", priority=-1, waited=30), make_candidate("high", priority=1)

    assert ordered(low, high) == ["high", "low"]


def test_waiting_makes_up_for_priority() -> None:
    old = make_candidate("old", waited=10 * 600)
    high = make_candidate("high", priority=9)

    assert ordered(high, old) == ["old", "high"]


def test_within_a_source_the_earliest_deadline_then_the_first_to_arrive_comes_first() -> None:
    later = make_candidate("later", waited=20)
    first = make_candidate("first", waited=30)
    due = make_candidate("due", due=HOUR)

    assert ordered(later, first, due) == ["due", "first", "later"]


def test_sources_of_equal_priority_take_turns_by_what_they_got() -> None:
    """The second of `a` waits until `b` has got as much as the first of `a`."""
    candidates = [
        make_candidate("a1", source="a", work=100, waited=9),
        make_candidate("a2", source="a", work=100, waited=8),
        make_candidate("b1", source="b", work=60, waited=7),
        make_candidate("b2", source="b", work=60, waited=6),
        make_candidate("b3", source="b", work=60, waited=5),
    ]

    assert ordered(*candidates) == ["a1", "b1", "b2", "a2", "b3"]
    assert ordered(*candidates, served={"a": 1000})[:3] == ["b1", "b2", "b3"]


def test_who_was_served_least_waits_where_a_deadline_would_be_missed() -> None:
    urgent = make_candidate("urgent", source="a", due=100, seconds=90)
    fair = make_candidate("fair", source="b", seconds=500)

    first, second = order([fair, urgent], now=NOW, policy=POLICY, served={"a": 10})

    assert (first.candidate.id, first.rule) == ("urgent", Rule.DEADLINE)
    assert "else urgent would be late" in first.why
    assert second.candidate.id == "fair"


@pytest.mark.parametrize(
    ("due", "why"),
    [(200, "there is time for both"), (80, "it is too late anyway"), (None, "it has no deadline")],
)
def test_a_deadline_that_does_not_bind_is_no_reason_to_be_unfair(
    due: float | None, why: str
) -> None:
    candidate = make_candidate("urgent", source="a", due=due, seconds=90)
    fair = make_candidate("fair", source="b", seconds=500)

    assert ordered(candidate, fair, served={"a": 10})[0] == "fair", why


def test_a_deadline_binds_for_what_comes_before_it_in_the_order_of_deadlines_too() -> None:
    """One quantum fits before `first`, but not before `second`, which waits for `first`."""
    first = make_candidate("first", source="a", due=200, seconds=90)
    second = make_candidate("second", source="a", due=201, seconds=90)
    fair = make_candidate("fair", source="b", seconds=500)

    assert ordered(first, second, fair, served={"a": 10}) == ["first", "second", "fair"]


def test_an_unknown_duration_counts_as_one_quantum_and_delays_nobody_by_itself() -> None:
    unknown = make_candidate("unknown", source="b")
    tight = make_candidate("tight", source="a", due=100, seconds=90)

    assert ordered(unknown, tight, served={"a": 10}) == ["tight", "unknown"]
    assert ordered(tight, make_candidate("a", due=100)) == ["a", "tight"]


def test_every_place_is_explained() -> None:
    places = order(
        [
            make_candidate("high", priority=2, waited=300),
            make_candidate("a", source="a"),
            make_candidate("b", source="b"),
        ],
        now=NOW,
        policy=POLICY,
        served={"a": 1234, "b": 5},
    )

    assert [place.rule for place in places] == [Rule.PRIORITY, Rule.FAIR_SHARE, Rule.PRIORITY]
    assert places[0].why == (
        "priority 2 and 5 min of waiting make 2.5; nobody else is left with 2 whole points"
    )
    assert "source b was served least of late (5)" in places[1].why


candidates = st.lists(
    st.builds(
        make_candidate,
        st.uuids().map(str),
        source=st.sampled_from("abc"),
        waited=st.floats(-60, 5 * HOUR),
        priority=st.integers(-3, 3),
        due=st.none() | st.floats(-10, 1000),
        seconds=st.none() | st.floats(0, 300),
        work=st.floats(0, 1000),
    ),
    max_size=8,
    unique_by=lambda candidate: candidate.id,
)


@settings(deadline=None)
@given(candidates, st.randoms(use_true_random=False))
def test_everybody_has_one_place_whatever_the_order_of_asking(
    asked: list[Candidate], shuffler: random.Random
) -> None:
    shuffled = list(asked)
    shuffler.shuffle(shuffled)

    places = order(asked, now=NOW, policy=POLICY)

    assert sorted(ids(places)) == sorted(candidate.id for candidate in asked)
    assert order(shuffled, now=NOW, policy=POLICY) == places
    points = [place.points for place in places]
    assert points == sorted(points, reverse=True)


@settings(deadline=None)
@given(candidates, st.floats(0, 10 * HOUR))
def test_nobody_who_arrives_after_the_bound_goes_before(
    asked: list[Candidate], later: float
) -> None:
    patient = make_candidate("patient", source="a", waited=2 * HOUR, priority=-3)
    newcomers = [
        make_candidate(
            f"new {other.id}",
            source="z",
            priority=other.priority,
            waited=2 * HOUR - 0.001 - starvation_bound(-3, other.priority, policy=POLICY),
            due=1,
            seconds=1,
        )
        for other in asked
    ]
    now = NOW + later + 10 * HOUR

    places = order([patient, *newcomers], now=now, policy=POLICY, served={"a": 10**9})

    assert ids(places)[0] == "patient"


def served_in_quanta(
    asked: Sequence[Candidate], choose: Callable[[list[Candidate], float, dict[str, float]], str]
) -> dict[str, float]:
    """Serve one quantum after another by a choice made anew each time; return when each ended."""
    left = {candidate.id: candidate for candidate in asked}
    served: dict[str, float] = {}
    clock, ended = NOW, {}
    while left:
        chosen = left[choose(list(left.values()), clock, served)]
        assert chosen.seconds is not None
        spent = min(POLICY.quantum_seconds, chosen.seconds)
        clock += spent
        served[chosen.source] = served.get(chosen.source, 0.0) + spent
        rest = chosen.seconds - spent
        if rest > 1e-6:
            left[chosen.id] = Candidate(**{**vars(chosen), "seconds": rest, "work": rest})
        else:
            ended[chosen.id] = clock
            del left[chosen.id]
    return ended


def by_the_order(left: list[Candidate], clock: float, served: dict[str, float]) -> str:
    # Everybody on one level, for as long as the scenario takes.
    policy = OrderPolicy(ageing_seconds=10**9, quantum_seconds=POLICY.quantum_seconds)
    return order(left, now=clock, policy=policy, served=served)[0].candidate.id


def by_deadline(left: list[Candidate], clock: float, served: dict[str, float]) -> str:
    return min(left, key=lambda candidate: (candidate.deadline, candidate.id)).id


def by_fair_share_alone(left: list[Candidate], clock: float, served: dict[str, float]) -> str:
    return min(left, key=lambda candidate: (served.get(candidate.source, 0.0), candidate.id)).id


due_candidates = st.lists(
    st.builds(
        make_candidate,
        st.uuids().map(str),
        source=st.sampled_from("abc"),
        due=st.integers(1, 900),
        seconds=st.integers(1, 300),
        work=st.just(100.0),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda candidate: candidate.id,
)


@settings(deadline=None)
@given(due_candidates)
def test_every_deadline_that_the_order_of_deadlines_keeps_is_kept(asked: list[Candidate]) -> None:
    def in_time(ended: dict[str, float]) -> set[str]:
        return {one.id for one in asked if ended[one.id] <= (one.deadline or 0) + 1e-6}

    kept = in_time(served_in_quanta(asked, by_deadline))

    assert kept <= in_time(served_in_quanta(asked, by_the_order))


def test_fair_share_alone_would_not_keep_them() -> None:
    """The negative control of the test above."""
    asked = [
        make_candidate("urgent", source="a", due=200, seconds=150),
        make_candidate("big", source="b", due=900, seconds=600),
    ]

    assert served_in_quanta(asked, by_the_order)["urgent"] <= NOW + 200
    assert served_in_quanta(asked, by_fair_share_alone)["urgent"] > NOW + 200


def test_where_no_deadline_binds_every_source_gets_its_share() -> None:
    asked = [
        make_candidate("a", source="a", due=10**6, seconds=6000),
        make_candidate("b", source="b", due=10**5, seconds=600),
    ]

    ended = served_in_quanta(asked, by_the_order)

    assert ended["b"] == pytest.approx(NOW + 1200, abs=POLICY.quantum_seconds)
