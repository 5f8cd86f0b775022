"""The thermal governor on a made-up clock: down fast, up slowly, paused while it stays hot."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.thermal import (
    CALM_SECONDS,
    SHARES,
    SHRINK_SECONDS,
    Heat,
    ThermalState,
    heat_of,
    next_state,
    unknown_heat,
)

#: Slows down at 92: the limit is 87, and it is cool below 82.
DEVICE = GpuFacts(index=0, uuid="GPU-1", name="Test", temperature_celsius=40, slowdown_celsius=92)
LOOKS = st.lists(st.tuples(st.floats(0.5, 12), st.sampled_from(Heat)), max_size=80)


def run(looks, state=ThermalState()):  # noqa: B008
    """The state after each look; looks are pauses before it, and what it found."""
    now, states = 0.0, []
    for pause, heat in looks:
        now += pause
        state = next_state(state, heat, now=now)
        states.append((now, state))
    return states


def shares(looks):
    return [state.share for _, state in run(looks)]


@pytest.mark.parametrize(
    ("facts", "heat"),
    [
        ({"temperature_celsius": 88}, Heat.HOT),
        ({"temperature_celsius": 87}, Heat.BETWEEN),
        ({"temperature_celsius": 82}, Heat.BETWEEN),
        ({"temperature_celsius": 81}, Heat.COOL),
        ({"temperature_celsius": None}, Heat.COOL),
        ({"temperature_celsius": 86, "slowdown_celsius": None}, Heat.HOT),
        ({"throttle_reasons": ("hw_thermal_slowdown",)}, Heat.HOT),
        ({"throttle_reasons": ("sw_thermal_slowdown",)}, Heat.HOT),
        ({"throttle_reasons": ("gpu_idle", "hw_power_brake_slowdown")}, Heat.HOT),
        ({"throttle_reasons": ("sw_power_cap", "hw_slowdown", "gpu_idle")}, Heat.COOL),
        ({"throttle_reasons": None}, Heat.COOL),
    ],
    ids=repr,
)
def test_heat_follows_temperature_and_by_throttling_for_thermal_reasons(facts, heat):
    device = msgspec.structs.replace(DEVICE, **facts)

    assert heat_of([device]) is heat
    assert heat_of([DEVICE, device]) is heat


def test_the_limit_that_is_set_is_the_one_that_counts():
    assert heat_of([DEVICE], 39) is Heat.HOT
    assert heat_of([DEVICE], 45) is Heat.BETWEEN
    assert heat_of([]) is Heat.COOL


def test_it_falls_step_by_step_to_a_pause_and_climbs_three_times_as_slowly():
    fall = shares([(5, Heat.HOT)] * 8)
    (*_, (_, paused)) = run([(5, Heat.HOT)] * 8)
    climb = [
        next_state(paused, Heat.HOT, now=40),
    ]
    for tick in range(26):
        climb.append(next_state(climb[-1], Heat.COOL, now=45 + 5 * tick))

    assert fall == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0, 0.0]
    steps = {state.share: 5 * place for place, state in reversed(list(enumerate(climb)))}
    assert steps == {0.0: 0, 0.125: 35, 0.25: 65, 0.5: 95, 1.0: 125}


def test_between_limit_and_margin_nothing_changes():
    (*_, (_, state)) = run([(5, Heat.HOT)] * 3 + [(5, Heat.BETWEEN)] * 100)

    assert state.share == 0.25


def test_a_look_that_is_not_cool_restarts_the_calm():
    looks = [(5, Heat.HOT), *[(5, Heat.COOL)] * 6, (5, Heat.BETWEEN), *[(5, Heat.COOL)] * 6]

    assert set(shares(looks)) == {0.5}
    assert shares([*looks, (5, Heat.COOL)])[-1] == 1.0


def test_what_was_not_seen_was_not_cool():
    """Neither a gap between looks nor devices that could not be read count as calm."""
    gap = [(5, Heat.HOT), (5, Heat.COOL), (600, Heat.COOL)]
    (*_, (_, cooling)) = run([(5, Heat.HOT), *[(5, Heat.COOL)] * 6])

    assert shares(gap)[-1] == 0.5
    assert next_state(cooling, Heat.COOL, now=40).share == 1.0
    assert next_state(unknown_heat(cooling), Heat.COOL, now=40).share == 0.5


@given(LOOKS)
def test_it_never_swings_faster_than_the_hysteresis_allows(looks):
    states = [(0.0, ThermalState()), *run(looks)]

    changes = [
        (now, after.depth - before.depth)
        for (_, before), (now, after) in pairwise(states)
        if after.depth != before.depth
    ]
    assert all(abs(step) == 1 for _, step in changes)
    for (earlier, _), (later, step) in pairwise(changes):
        if step < 0:
            assert later - earlier >= CALM_SECONDS
    falls = [now for now, step in changes if step > 0]
    assert all(b - a >= SHRINK_SECONDS for a, b in pairwise(falls))


@given(LOOKS, st.data())
def test_the_hotter_it_was_the_smaller_the_share(looks, data):
    hotter = [
        (pause, data.draw(st.sampled_from(Heat).filter(heat.__le__))) for pause, heat in looks
    ]

    assert all(a >= b for a, b in zip(shares(looks), shares(hotter), strict=True))


@given(LOOKS, st.floats(0.5, 12))
def test_it_always_comes_back_when_it_is_cool(looks, pause):
    steps = len(SHARES) - 1
    enough = int((CALM_SECONDS / pause + 2) * steps) + 2

    assert shares([*looks, *[(pause, Heat.COOL)] * enough])[-1] == 1.0


@given(LOOKS, st.floats(0.5, 12))
def test_it_always_pauses_when_it_stays_hot(looks, pause):
    steps = len(SHARES) - 1
    enough = int((SHRINK_SECONDS / pause + 2) * steps) + 2

    assert shares([*looks, *[(pause, Heat.HOT)] * enough])[-1] == 0.0
