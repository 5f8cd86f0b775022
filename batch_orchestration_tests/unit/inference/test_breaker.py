"""The circuit breaker: an engine in trouble is probed instead of being fed the whole batch."""

import pytest

from batch_orchestration.inference.faults.retries import Breaker, BreakerPolicy

POLICY = BreakerPolicy(last=10, failure_rate=0.5, pause_seconds=10, max_pause_seconds=30, probes=3)


def tripped(now: float = 0.0) -> Breaker:
    breaker = Breaker(POLICY)
    for _ in range(10):
        breaker.record(failed=True, now=now)
    return breaker


def test_a_few_failures_prove_nothing() -> None:
    breaker = Breaker(POLICY)
    for _ in range(9):
        breaker.record(failed=True, now=0)

    assert not breaker.is_open


@pytest.mark.parametrize(("failures", "opens"), [(5, False), (6, True)])
def test_it_opens_when_more_than_the_share_of_the_latest_fails(failures: int, opens: bool) -> None:
    breaker = Breaker(POLICY)
    for failed in [False] * 10 + [True] * failures:
        breaker.record(failed=failed, now=0)

    assert breaker.is_open is opens


def test_while_open_nothing_is_sent_before_the_pause_is_over_and_then_one_probe() -> None:
    breaker = tripped(now=100)

    assert not breaker.may_submit(109.9)
    assert breaker.may_submit(110)
    assert not breaker.may_submit(110)


def test_one_success_closes_it_and_forgets_the_past() -> None:
    breaker = tripped()
    breaker.may_submit(10)

    breaker.record(failed=False, now=11)

    assert not breaker.is_open
    breaker.record(failed=True, now=12)
    assert not breaker.is_open


def test_each_failed_probe_doubles_the_pause_up_to_a_limit() -> None:
    breaker = tripped(now=0)
    starts = []
    for _ in range(3):
        assert breaker.probe_at is not None
        starts.append(breaker.probe_at)
        breaker.may_submit(breaker.probe_at)
        breaker.record(failed=True, now=starts[-1])

    assert starts == [10, 30, 60]


def test_after_so_many_failed_probes_it_gives_up() -> None:
    breaker = tripped()
    for number in range(3):
        assert not breaker.gave_up
        breaker.may_submit(1000 * (number + 1))
        breaker.record(failed=True, now=1000 * (number + 1))

    assert breaker.gave_up


def test_a_probe_that_is_let_go_makes_way_for_another_one() -> None:
    breaker = tripped(now=0)
    assert breaker.may_submit(10)
    assert not breaker.may_submit(11)

    breaker.note_let_go()

    assert breaker.may_submit(11)


def test_failures_that_were_in_flight_when_it_opened_are_no_probes() -> None:
    breaker = tripped(now=0)
    for _ in range(50):
        breaker.record(failed=True, now=1)

    assert not breaker.gave_up
    assert breaker.probe_at == 10
