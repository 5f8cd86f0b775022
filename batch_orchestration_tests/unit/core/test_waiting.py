"""Calls that may never return, and the time for which a value has not changed."""

import threading

import pytest

from batch_orchestration.core.waiting import BackgroundCall, IdleClock


def test_a_call_that_hangs_is_left_alone_and_its_result_is_there_once_it_returns():
    answer = threading.Event()
    call = BackgroundCall("hanging", lambda: answer.wait(200))

    assert not call.returned(within=0.01)
    answer.set()

    assert call.returned(within=100)
    assert call.result() is True
    assert call.seconds >= 0.01


def test_a_call_that_raises_raises_where_its_result_is_used():
    call = BackgroundCall("broken", lambda: 1 / 0)

    assert call.returned(within=100)
    with pytest.raises(ZeroDivisionError):
        call.result()


@pytest.mark.parametrize(
    ("observed", "seconds"),
    [
        ([(5, "a")], 0),
        ([(5, "a"), (10, "a")], 5),
        ([(5, "a"), (10, "a"), (15, "b"), (18, "b")], 3),
        ([(5, "a"), (3600, "a")], 30),
        ([(5, None), (10, None)], 10),
    ],
    ids=["new", "unchanged", "changed", "the observer was suspended", "never there"],
)
def test_an_idle_clock_counts_from_the_last_change_and_no_long_step(observed, seconds):
    clock = IdleClock(longest_step=30, now=0)

    for now, value in observed:
        clock.observe(value, now)

    assert clock.seconds == seconds
