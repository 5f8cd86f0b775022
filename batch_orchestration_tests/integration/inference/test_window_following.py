"""The window that follows an engine is as good as the best fixed one, on a simulated clock."""

from functools import cache

import pytest

from batch_orchestration.inference.window.control import WindowControl
from batch_orchestration_tests.support.window_simulation import (
    SHAPES,
    Shape,
    best_of,
    bounds_of,
    derived_start,
    run_batch,
)

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
#: The sweep of `benchmarks/window.py` is finer, and finds none that is better by 1 %.
WIDTHS = (8, 40, 48, 56, 64, 96, 128, 144, 256)
#: In the twenty minutes that a batch takes: some decisions are made each minute.
MOST_TURNS = 10


@cache
def best_throughput(shape: Shape) -> float:
    return best_of(shape, WIDTHS)[1].throughput


@shapes
def test_from_the_derived_width_it_is_as_good_as_the_best_fixed_window(shape: Shape) -> None:
    course = run_batch(shape, WindowControl(derived_start(shape), bounds_of(shape)))

    assert course.requests == shape.requests
    assert course.throughput >= 0.98 * best_throughput(shape)
    assert course.turns <= MOST_TURNS


@shapes
@pytest.mark.parametrize("start", [8, 1024])
def test_from_a_bad_width_it_finds_a_good_one_and_stays_there(shape: Shape, start: int) -> None:
    control = WindowControl(start, bounds_of(shape))
    first = run_batch(shape, control)

    found = run_batch(shape, control, seed="2")

    assert first.throughput >= 0.9 * best_throughput(shape)
    assert first.turns + found.turns <= 2 * MOST_TURNS
    assert (
        found.throughput
        >= 0.98 * run_batch(shape, WindowControl(best_width(shape), None), seed="2").throughput
    )
    late = found.widths[len(found.widths) // 2 :]
    assert max(late) <= 1.4 * min(late) + 2


@cache
def best_width(shape: Shape) -> int:
    return best_of(shape, WIDTHS)[0]
