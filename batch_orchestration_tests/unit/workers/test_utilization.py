"""A run's account: every second has one name, and the names add up."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.workers.utilization import (
    QUANTITIES,
    RunSnapshot,
    Stage,
    TimeAccountant,
    TimeBreakdown,
    Utilization,
)

PARTS = (
    *("start_up_seconds", "busy_seconds", "feed_gap_seconds", "held_seconds"),
    *("drain_seconds", "commit_seconds"),
)


def feeding(in_flight: int, **fields: Any) -> RunSnapshot:
    """A run that feeds its own batch, with a window of 8."""
    values = {"window": 8, "unthrottled_window": 8, "by_batch": {"own": in_flight}}
    return RunSnapshot(stage=Stage.FEEDING, in_flight=in_flight, **{**values, **fields})


def account_of(*looks: tuple[float, RunSnapshot], batch_id: str = "own") -> TimeBreakdown:
    """The account after looks at these times."""
    accountant = TimeAccountant("own")
    for at, moment in looks:
        accountant.observe(moment, at)
    return TimeBreakdown(batch_id=batch_id, run_id="run-1", **accountant.accounts()[batch_id])


def test_each_stage_of_a_run_is_charged_by_its_name() -> None:
    account = account_of(
        (100.0, RunSnapshot(stage=Stage.STARTING)),
        (140.0, feeding(8)),
        (200.0, feeding(2, dry=True)),
        (208.0, RunSnapshot(stage=Stage.COMMITTING)),
        (211.0, RunSnapshot(stage=Stage.COMMITTING)),
    )

    assert account.start_up_seconds == 40.0
    assert account.busy_seconds == 60.0 + 8.0 * 2 / 8
    assert account.drain_seconds == 8.0 * 6 / 8
    assert account.commit_seconds == 3.0
    assert account.feed_gap_seconds == account.held_seconds == 0.0
    assert account.wall_seconds == 111.0


@pytest.mark.parametrize(
    ("moment", "busy", "held", "gap", "drain"),
    [
        (feeding(6), 6, 0, 2, 0),
        (feeding(6, dry=True), 6, 0, 0, 2),
        # Of 8 places 4 may be filled and 3 are: half is held back, an eighth is a gap.
        (feeding(3, window=4), 3, 4, 1, 0),
        (feeding(7, window=4), 7, 1, 0, 0),
        (feeding(0, window=0, unthrottled_window=0), 0, 0, 8, 0),
        # A request that waits a moment while the window is open does not make the engine small.
        (feeding(3, engine=EngineMetrics(running=2, waiting=1)), 3, 0, 5, 0),
        # Answers that are not read yet count as in flight, but the engine does not have them.
        (feeding(8, engine=EngineMetrics(running=2, waiting=0)), 2, 0, 6, 0),
    ],
    ids=["gap", "drain", "hot", "narrowed while full", "window unknown", "few given", "unread"],
)
def test_time_is_divided_by_the_places_that_are_filled(
    moment: RunSnapshot, busy: float, held: float, gap: float, drain: float
) -> None:
    account = account_of((0.0, moment), (8.0, moment))

    parts = (account.busy_seconds, account.held_seconds, account.feed_gap_seconds)
    assert (*parts, account.drain_seconds) == (busy, held, gap, drain)


def test_a_window_wider_than_the_engine_does_not_make_a_full_engine_look_idle() -> None:
    """It runs 4 and lets 4 wait; later 4 in flight are all that it could run."""
    full = EngineMetrics(running=4, waiting=4)
    looks = ((0.0, feeding(8, engine=full)), (5.0, feeding(4, engine=full)), (9.0, feeding(4)))

    account = account_of(*looks)

    assert account.busy_seconds == 9.0


def test_an_engine_that_once_ran_few_is_believed_when_it_runs_more() -> None:
    """Right after its start it reads prompts, and lets all others wait."""
    ramp = feeding(8, engine=EngineMetrics(running=1, waiting=7))
    well = feeding(8, engine=EngineMetrics(running=8, waiting=0))

    account = account_of((0.0, ramp), (1.0, well), (2.0, feeding(2)), (10.0, feeding(2)))

    assert account.busy_seconds == 2.0 + 8.0 * 2 / 8
    assert account.feed_gap_seconds == 6.0


def test_a_full_window_at_which_nothing_waits_may_be_too_narrow_and_is_told_so() -> None:
    """By the window the engine is full; by its own figures it could run more."""
    narrow = feeding(8, engine=EngineMetrics(running=8, waiting=0))
    fed = feeding(8, engine=EngineMetrics(running=6, waiting=2))

    account = account_of((0.0, narrow), (3.0, fed), (10.0, fed))

    assert (account.busy_seconds, account.narrow_seconds) == (10.0, 3.0)


def test_an_engine_that_falls_silent_is_believed_to_have_what_it_was_given() -> None:
    starving = feeding(8, engine=EngineMetrics(running=2, waiting=0))

    account = account_of((0.0, starving), (8.0, feeding(8)), (12.0, feeding(8)))

    assert account.busy_seconds == 2.0 + 4.0


def test_time_is_divided_between_batches_by_what_each_has_in_flight() -> None:
    both = feeding(8, by_batch={"own": 2, "guest": 6})
    looks = (
        (0.0, RunSnapshot(stage=Stage.STARTING)),
        (10.0, both),
        (18.0, feeding(0)),
        (20.0, RunSnapshot(stage=Stage.COMMITTING)),
        (21.0, RunSnapshot(stage=Stage.COMMITTING)),
    )

    own, guest = account_of(*looks), account_of(*looks, batch_id="guest")

    assert (guest.wall_seconds, guest.busy_seconds) == (6.0, 6.0)
    assert (own.start_up_seconds, own.busy_seconds, own.commit_seconds) == (10.0, 2.0, 1.0)
    assert own.feed_gap_seconds == 2.0, "with nothing in flight the time is the run's own batch's"
    assert own.wall_seconds + guest.wall_seconds == 21.0


def test_the_engines_own_figures_say_whether_it_computes() -> None:
    idle, busy = EngineMetrics(running=0, waiting=0), EngineMetrics(running=1, waiting=0)
    looks = ((0.0, feeding(8, engine=idle)), (3.0, feeding(8, engine=busy)), (8.0, feeding(0)))

    assert account_of(*looks).engine_busy_seconds == 5.0


def test_tokens_while_full_are_told_from_tokens_over_all() -> None:
    """10 s full with 100 tokens a second, then 5 s half full with 80."""

    def read(in_flight: int, tokens: int) -> RunSnapshot:
        return feeding(in_flight, dry=in_flight < 8, engine=EngineMetrics(generation_tokens=tokens))

    account = account_of((0.0, read(8, 5_000)), (10.0, read(4, 6_000)), (15.0, read(4, 6_400)))

    assert (account.full_seconds, account.full_tokens) == (10.0, 1_000.0)
    assert account.tokens == 1_400.0, "what another run had made the engine write is not counted"
    total = Utilization.of([account])
    assert total is not None
    assert total.full_tokens_per_second == 100.0
    assert total.tokens_per_second == pytest.approx(1_400 / 15)


def test_a_counter_that_begins_anew_with_a_new_engine_loses_no_tokens() -> None:
    def read(tokens: int) -> RunSnapshot:
        return feeding(8, engine=EngineMetrics(generation_tokens=tokens))

    account = account_of((0.0, read(100)), (1.0, read(900)), (2.0, read(50)))

    assert account.tokens == 850.0


def test_a_reading_that_was_missed_loses_no_tokens() -> None:
    """An engine that is busy does not always answer in time; its counter goes on meanwhile."""

    def read(tokens: int | None, answered: int) -> RunSnapshot:
        figures = None if tokens is None else EngineMetrics(generation_tokens=tokens)
        return feeding(8, engine=figures, tokens=answered)

    account = account_of(
        (0.0, read(100, 0)),
        (1.0, read(200, 90)),
        (2.0, read(None, 180)),
        (3.0, read(None, 270)),
        (4.0, read(500, 360)),
        (5.0, read(600, 450)),
    )

    assert (account.tokens, account.full_tokens) == (500.0, 500.0)
    assert account.full_seconds == 5.0


def test_an_engine_that_tells_nothing_is_counted_by_its_answers() -> None:
    account = account_of((0.0, feeding(8)), (1.0, feeding(8, tokens=30)), (2.0, feeding(8)))

    assert (account.tokens, account.full_seconds) == (30.0, 2.0)


def test_a_utilization_is_that_of_all_runs_together() -> None:
    killed = TimeBreakdown(batch_id="b", run_id="1", wall_seconds=50.0, start_up_seconds=50.0)
    second = TimeBreakdown(
        batch_id="b", run_id="2", wall_seconds=50.0, busy_seconds=40.0, drain_seconds=10.0
    )

    total = Utilization.of([killed, second])

    assert total is not None
    assert (total.runs, total.wall_seconds, total.used_seconds) == (2, 100.0, 40.0)
    assert total.fraction == pytest.approx(0.4)
    assert Utilization.of([]) is None


counts = st.integers(0, 20)
figures = st.none() | st.builds(
    EngineMetrics,
    running=st.none() | counts,
    waiting=st.none() | counts,
    generation_tokens=st.none() | st.integers(0, 10_000),
)
moments = st.builds(
    RunSnapshot,
    stage=st.sampled_from(Stage),
    in_flight=counts,
    by_batch=st.dictionaries(st.sampled_from(["own", "guest", "other"]), counts),
    window=counts,
    unthrottled_window=counts,
    dry=st.booleans(),
    engine=figures,
    tokens=st.integers(0, 10_000),
    restarts=counts,
)


@given(st.lists(st.tuples(st.floats(0, 100), moments), min_size=2, max_size=30))
def test_the_parts_add_up_to_the_wall_time_whatever_a_run_sees(
    looks: list[tuple[float, RunSnapshot]],
) -> None:
    accountant, now = TimeAccountant("own"), 0.0
    for seconds, moment in looks:
        now += seconds
        accountant.observe(moment, now)

    accounts = accountant.accounts().values()
    for account in accounts:
        assert account.keys() == set(QUANTITIES)
        assert all(account[name] >= 0 for name in PARTS)
        assert math.isclose(
            sum(account[name] for name in PARTS), account["wall_seconds"], abs_tol=1e-6
        )
        assert account["narrow_seconds"] <= account["busy_seconds"] + 1e-6
        assert account["engine_busy_seconds"] <= account["wall_seconds"] + 1e-6
        assert account["full_tokens"] <= account["tokens"] + 1e-6
    wall = sum(account["wall_seconds"] for account in accounts)
    assert math.isclose(wall, now - looks[0][0], abs_tol=1e-6)
