"""What the window makes of the figures that an engine tells, on a simulated clock."""

import pytest

from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.inference.window.control import Bounds, WindowControl


def looks(
    control: WindowControl, figures: EngineMetrics | None, *, in_flight: int, times: int = 60
):
    """As many looks as a minute has, at an engine that settles two requests a second."""
    return [
        control.note(figures, in_flight=in_flight, settled=2 * now, now=float(now))
        for now in range(times)
    ]


BUSY = EngineMetrics(running=8, waiting=0, kv_usage=0.1, kv_cache_tokens=10_000)


@pytest.mark.parametrize(
    ("figures", "in_flight"),
    [
        (None, 16),
        (EngineMetrics(), 16),
        (EngineMetrics(running=8), 16),
        (BUSY, 3),  # The source is dry: that nothing waits says nothing.
        (BUSY, 20),  # It was narrowed, and is still being left.
        (EngineMetrics(running=12, waiting=4, kv_usage=0.5), 16),
    ],
    ids=["no answer", "no metrics", "not vLLM's", "not filled", "too full", "just right"],
)
def test_what_tells_nothing_changes_nothing(figures: EngineMetrics | None, in_flight: int) -> None:
    control = WindowControl(16, Bounds())

    assert not any(looks(control, figures, in_flight=in_flight))
    assert control.width == 16


def test_a_width_that_was_set_stays() -> None:
    control = WindowControl(16, None)

    assert not any(looks(control, BUSY, in_flight=16))
    assert control.width == 16


def test_it_grows_while_nothing_waits_and_never_beyond_its_bounds() -> None:
    control = WindowControl(16, Bounds(most=20))

    looks(control, BUSY, in_flight=16)
    assert control.width == 20

    looks(control, BUSY, in_flight=20)
    assert control.width == 20


def test_counters_that_begin_anew_are_those_of_another_engine() -> None:
    control = WindowControl(16, Bounds())
    worn = EngineMetrics(
        running=15, waiting=1, kv_usage=1.0, kv_cache_tokens=1000, preemptions=10**6,
        generation_tokens=10**6,
    )  # fmt: skip
    fresh = EngineMetrics(running=15, waiting=1, kv_usage=1.0, kv_cache_tokens=1000, preemptions=0)

    control.note(worn, in_flight=16, settled=0, now=0.0)
    changes = [
        control.note(fresh, in_flight=16, settled=now, now=float(now)) for now in range(1, 60)
    ]

    assert not any(changes)
