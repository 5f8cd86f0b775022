"""Token buckets: never more than the burst and what flowed in, and an exact time to come back."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.queue.rate_limits import (
    SECONDS_PER_HOUR,
    Bucket,
    Rate,
    SourceRates,
    SubmissionEvent,
)

RATE = Rate(per_hour=3600, burst=10)  # one a second
amounts = st.floats(0.1, 10)
gaps = st.floats(0, 20)
rates = st.builds(Rate, per_hour=st.floats(1, 1e6), burst=st.floats(10, 1e4))


@given(rate=rates, attempts=st.lists(st.tuples(gaps, amounts), max_size=40))
def test_in_no_interval_passes_more_than_the_burst_and_what_flowed_in(rate, attempts):
    now, passed = 0.0, []
    for gap, amount in attempts:
        now += gap
        if Bucket.after(passed, rate=rate).retry_after(amount, now=now) == 0:
            passed.append((now, amount))

    for first, last in itertools.combinations_with_replacement(range(len(passed)), 2):
        seconds = passed[last][0] - passed[first][0]
        total = sum(amount for _, amount in passed[first : last + 1])
        assert total <= rate.burst + seconds * rate.per_hour / SECONDS_PER_HOUR + 1e-3


@given(
    rate=rates,
    before=st.lists(st.tuples(gaps, amounts), min_size=1, max_size=20),
    amount=amounts,
)
def test_who_comes_back_when_told_may_pass_and_a_moment_earlier_may_not(rate, before, amount):
    times = itertools.accumulate(gap for gap, _ in before)
    events = [(at, taken) for at, (_, taken) in zip(times, before, strict=True)]
    now = events[-1][0]
    bucket = Bucket.after(events, rate=rate)

    wait = bucket.retry_after(amount, now=now)

    assert bucket.retry_after(amount, now=now + wait) == 0
    if wait > 1:
        assert bucket.retry_after(amount, now=now + wait * 0.999) > 0


@given(events=st.lists(st.tuples(st.floats(0, 100), amounts), max_size=10), seed=st.randoms())
def test_the_order_in_which_events_are_told_does_not_matter(events, seed):
    shuffled = list(events)
    seed.shuffle(shuffled)

    assert Bucket.after(shuffled, rate=RATE) == Bucket.after(events, rate=RATE)


def test_what_is_larger_than_the_burst_waits_for_a_full_bucket_and_is_owed_afterwards():
    bucket = Bucket.after([(0.0, 4.0)], rate=RATE)

    assert bucket.retry_after(25, now=0.0) == 4
    after = bucket.less(25, now=4.0)
    assert after.retry_after(1, now=4.0) == 16
    assert after.retry_after(25, now=4.0) == 25


def test_a_clock_that_goes_back_gives_nothing_away_and_never_locks_for_ever():
    bucket = Bucket.after([(1000.0, 10.0)], rate=RATE)

    assert bucket.filled(0.0).level == 0
    wait = bucket.retry_after(5, now=0.0)
    assert wait == 1005
    assert bucket.retry_after(5, now=wait) == 0


def test_sources_do_not_pay_for_each_other():
    sources = SourceRates(
        submissions=Rate(per_hour=60, burst=2),
        requests=Rate(per_hour=3600, burst=100),
        events=(SubmissionEvent("alice", 0.0, 40), SubmissionEvent("alice", 0.0, 40)),
    )

    assert sources.retry_after("bob", 100, now=0.0) == 0
    assert sources.retry_after("alice", 1, now=0.0) == 60  # by count
    assert sources.retry_after("alice", 100, now=60.0) == 20  # by requests
    assert sources.plus("bob", 100, now=0.0).retry_after("bob", 1, now=0.0) == 1


def test_a_file_that_nobody_has_counted_needs_one_request_of_its_share():
    events = (SubmissionEvent("alice", 0.0, 100),)
    sources = SourceRates(requests=Rate(per_hour=3600, burst=100), events=events)

    assert sources.retry_after("alice", None, now=0.0) == pytest.approx(1)
    assert sources.retry_after("alice", None, now=1.0) == 0
