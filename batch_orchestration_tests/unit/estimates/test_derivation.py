"""Every formula that sizes a run, by table."""

import pytest

from batch_orchestration.estimates.derivation import (
    RequestTokens,
    cache_tokens,
    chunk_size,
    memory_share,
    reading_cost,
    sequences,
    window,
)
from batch_orchestration_tests.support.estimates import make_costs

GIB = 2**30
MEAN = RequestTokens(prompt=400, completion=200)  # 500 held


@pytest.mark.parametrize(
    ("cache", "slots", "tokens", "value"),
    [
        (None, None, None, 256),  # nothing known: the default
        (None, None, MEAN, 256),
        (100_000, None, None, 256),
        (None, 128, MEAN, 128 + 2 + 16),  # slots alone
        (100_000, None, MEAN, 190 + 2 + 24),  # cache alone: 0.95 x 100,000 / 500 = 190
        (100_000, 128, MEAN, 128 + 2 + 16),  # the slots bind
        (50_000, 128, MEAN, 95 + 2 + 12),  # the cache binds
        (600, 128, RequestTokens(prompt=4000, completion=0), 1 + 2 + 1),  # less than one fits
        (10**9, 4096, MEAN, 1024),  # never more than the connections
    ],
)
def test_the_window_is_the_running_requests_and_a_queue(cache, slots, tokens, value: int) -> None:
    derived = window(kv_cache_tokens=cache, max_num_seqs=slots, tokens=tokens)

    assert derived.value == value


def test_a_derivation_shows_its_numbers() -> None:
    derived = window(kv_cache_tokens=50_000, max_num_seqs=128, tokens=MEAN)

    assert str(derived) == (
        "window 109 = 95 running (128 sequences at a time; or 0.95 x 50,000 tokens of KV cache"
        " / 500 a request (400 + 200 / 2)) + 14 waiting at the engine"
    )


@pytest.mark.parametrize(
    ("cache", "tokens", "most", "value"),
    [
        (None, MEAN, 1024, None),
        (100_000, None, 1024, None),
        (100_000, MEAN, 1024, 240),  # 1.25 x 0.95 x 200 = 237.5, in eights
        (100_000, MEAN, 128, 128),
        (10_000_000, MEAN, 1024, 1024),
        (1_000, MEAN, 1024, 8),
    ],
)
def test_slots_are_a_little_more_than_the_cache_holds(cache, tokens, most, value) -> None:
    derived = sequences(kv_cache_tokens=cache, tokens=tokens, most=most)

    assert (derived and derived.value) == value


@pytest.mark.parametrize(
    ("devices", "needed", "value"),
    [
        ([], None, None),
        ([(79 * GIB, 80 * GIB)], None, 0.93),  # (79 - 4) / 80
        ([(80 * GIB, 80 * GIB)], None, 0.95),
        ([(24 * GIB, 24 * GIB)], None, 0.95),  # (24 - 1.2) / 24
        ([(23 * GIB, 24 * GIB)], None, 0.90),
        ([(40 * GIB, 80 * GIB)], None, 0.45),  # a neighbour holds half
        ([(79 * GIB, 80 * GIB), (40 * GIB, 80 * GIB)], None, 0.45),  # the fuller one decides
        ([(20 * GIB, 80 * GIB)], 19 * GIB, 0.23),  # the need wins over the margin ...
        ([(20 * GIB, 80 * GIB)], 30 * GIB, 0.25),  # ... as far as it is free
        ([(int(0.5 * GIB), 80 * GIB)], None, None),
    ],
)
def test_the_share_of_memory_is_the_free_memory_less_a_margin(devices, needed, value) -> None:
    derived = memory_share(devices, needed_bytes=needed)

    assert (derived and derived.value) == value


def test_a_share_never_claims_more_than_is_free() -> None:
    for free in range(1, 81):
        derived = memory_share([(free * GIB, 80 * GIB)], needed_bytes=60 * GIB)
        assert derived is None or derived.value * 80 <= free
        assert derived is None or derived.value <= 0.95


@pytest.mark.parametrize(
    ("claimed", "needed", "per_token", "value"),
    [
        (20 * GIB, 10 * GIB, 2**17, 2048 + 10 * 2**13),
        (20 * GIB, 10 * GIB, 0, None),
        (9 * GIB, 10 * GIB, 2**17, 2048),
    ],
)
def test_the_cache_gets_the_memory_that_the_model_leaves(claimed, needed, per_token, value) -> None:
    assert (
        cache_tokens(
            claimed_bytes=claimed, needed_bytes=needed, least_tokens=2048, bytes_per_token=per_token
        )
        == value
    )


@pytest.mark.parametrize(
    ("measured", "tokens", "value"),
    [
        (None, MEAN, 1000),
        (make_costs(request=0.1), None, 1000),
        (make_costs(request=0.1), MEAN, 600),  # 60 s / 0.1 s
        (make_costs(request=0.0123), MEAN, 4900),
        (make_costs(request=0.001), MEAN, 5000),
        (make_costs(request=0.0), MEAN, 5000),
        (make_costs(request=30.0), MEAN, 50),
        (make_costs(prompt_token=0.001), MEAN, 150),  # 60 / 0.4
        (make_costs(completion_token=0.001), MEAN, 300),  # 60 / 0.2
        (make_costs(step=0.05), MEAN, 600),  # 60 / (0.05 x 200 / 100)
    ],
)
def test_a_chunk_takes_a_minute(measured, tokens, value: int) -> None:
    assert chunk_size(measured, tokens, at_a_time=100).value == value


@pytest.mark.parametrize(
    ("measured", "value"),
    [
        (None, 0.1),
        (make_costs(request=1.0), 0.1),  # Tokens cost nothing: nothing is known of them.
        (make_costs(prompt_token=1.0, completion_token=4.0), 0.25),
        (make_costs(prompt_token=1.0, completion_token=2.0, step=200.0), 0.25),
        (make_costs(completion_token=4.0), 0.02),
        (make_costs(prompt_token=9.0, completion_token=4.0), 0.5),
    ],
)
def test_the_cost_of_reading_follows_the_measurements(measured, value: float) -> None:
    assert reading_cost(measured, at_a_time=100) == value


def test_within_the_bounds_a_commit_comes_every_half_to_two_minutes() -> None:
    for hundredths in range(2, 100):
        seconds = hundredths / 100
        size = chunk_size(make_costs(request=seconds), MEAN, at_a_time=100).value
        assert 55 <= size * seconds <= 66, (seconds, size)
