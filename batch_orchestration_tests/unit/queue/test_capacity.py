"""Room: what fits beside what is queued, and the numbers that are said where it does not."""

from dataclasses import replace

import pytest

from batch_orchestration.queue.capacity import Load, check_capacity
from batch_orchestration.queue.demand import Demand, Limits, rough_tokens
from batch_orchestration.queue.entries import WaitReason

GIB = 2**30
LIMITS = Limits(
    unfinished_batches=3,
    queued_requests=1000,
    queued_tokens=50_000,
    disk_reserve_bytes=2 * GIB,
    output_bytes_ratio=2.0,
)
EMPTY = Load(free_bytes=10 * GIB)


def demand(requests: int | None = 100, tokens: int | None = 5000, size_bytes: int = 1000, **more):
    return Demand(requests=requests, tokens=tokens, size_bytes=size_bytes, **more)


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (EMPTY, demand()),
        (EMPTY, demand(requests=1000, tokens=50_000)),
        (Load(batches=2, requests=900, tokens=45_000, free_bytes=10 * GIB), demand()),
        (EMPTY, demand(size_bytes=4 * GIB)),
        (Load(owed_bytes=6 * GIB, free_bytes=10 * GIB), demand(size_bytes=GIB)),
        (EMPTY, demand(size_bytes=3 * GIB, new_bytes=2 * GIB)),
        # What is not known is not held against it.
        (Load(requests=1000, tokens=50_000, free_bytes=10 * GIB), demand(None, None)),
        (Load(free_bytes=None), demand(size_bytes=1000 * GIB)),
    ],
)
def test_what_fits_exactly_is_let_in(load, wanted):
    assert check_capacity(wanted, load, LIMITS) is None


@pytest.mark.parametrize(
    ("load", "wanted", "reason", "numbers"),
    [
        (Load(batches=3), demand(), WaitReason.QUEUE_FULL, ["3 batches", "3 may be"]),
        (Load(batches=4), demand(None, None), WaitReason.QUEUE_FULL, ["4 batches"]),
        (Load(requests=901), demand(), WaitReason.REQUESTS_QUEUED, ["100", "901", "1,000"]),
        (EMPTY, demand(requests=1001), WaitReason.REQUESTS_QUEUED, ["1,001", "alone"]),
        (Load(tokens=45_001), demand(), WaitReason.TOKENS_QUEUED, ["5,000", "45,001", "50,000"]),
        (
            Load(free_bytes=4 * GIB),
            demand(size_bytes=GIB + 1),
            WaitReason.DISK_LOW,
            ["2.0 GiB", "4.0 GiB free", "2.0 GiB stay in reserve"],
        ),
        (
            Load(free_bytes=10 * GIB, owed_bytes=7 * GIB),
            demand(size_bytes=GIB),
            WaitReason.DISK_LOW,
            ["7.0 GiB"],
        ),
        (
            Load(free_bytes=10 * GIB),
            demand(size_bytes=3 * GIB, new_bytes=3 * GIB),
            WaitReason.DISK_LOW,
            ["9.0 GiB"],
        ),
        (Load(free_bytes=GIB), demand(0, 0, 0), WaitReason.DISK_LOW, ["1.0 GiB free"]),
    ],
)
def test_one_more_than_fits_waits_and_is_told_the_numbers(load, wanted, reason, numbers):
    blocker = check_capacity(wanted, load, LIMITS)

    assert blocker is not None
    assert blocker.reason is reason
    assert all(number in blocker.detail for number in numbers), blocker.detail


def test_every_reason_is_gone_with_its_cause():
    wanted = demand(requests=400, tokens=30_000, size_bytes=GIB)
    load = Load(batches=3, requests=700, tokens=30_000, free_bytes=3 * GIB)
    met = []

    for relief in (
        {"batches": 2}, {"requests": 600}, {"tokens": 20_000}, {"free_bytes": 4 * GIB}
    ):  # fmt: skip
        met.append(check_capacity(wanted, load, LIMITS).reason)
        load = Load(**{**vars(load), **relief})

    assert met == ["queue_full", "requests_queued", "tokens_queued", "disk_low"]
    assert check_capacity(wanted, load, LIMITS) is None


def test_a_load_grows_by_what_is_let_in():
    load = EMPTY.plus(demand(new_bytes=10), LIMITS).plus(demand(None, None, 0), LIMITS)

    assert (load.batches, load.requests, load.tokens) == (2, 100, 5000)
    assert load.owed_bytes == 2010


def test_a_guess_is_high_but_not_above_what_a_batch_may_have():
    limits = replace(LIMITS, open_requests=100)

    guessed = demand(None, None, size_bytes=50_000).guessed(limits)

    assert guessed.requests == 100
    assert guessed.tokens == rough_tokens(100, 50_000)
    assert demand(None, None, 1000).guessed(limits).requests == 11
    assert demand().guessed(replace(limits, open_requests=1)) == demand()


def test_a_batch_takes_room_for_its_window_only_but_the_disk_for_all_of_it():
    """However long its file is: the requests beyond are not open yet, but their answers will be."""
    limits = replace(LIMITS, open_requests=500)
    large = demand(requests=4000, tokens=160_000, size_bytes=GIB)

    load = EMPTY.plus(large, limits)

    assert (load.requests, load.tokens, load.owed_bytes) == (500, 20_000, 2 * GIB)
    assert check_capacity(large, load, limits) is None
    reason, detail = check_capacity(large, load.plus(demand(), limits), limits)
    assert reason is WaitReason.REQUESTS_QUEUED
    assert "its first 500 requests and the 600 queued are more than the 1,000" in detail
    # What is left of it takes what is left, once that is less than a window.
    assert Load().plus(demand(requests=70, tokens=700), limits).requests == 70
