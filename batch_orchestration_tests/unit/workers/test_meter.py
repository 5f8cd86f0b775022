"""Rates of a run."""

import pytest

from batch_orchestration.workers.progress import WINDOW_SECONDS, Meter


def test_rates_are_those_of_the_last_window() -> None:
    meter = Meter()
    for second in range(100):
        meter.sample(float(second))
        meter.completed += 1 if second < 50 else 3
        meter.completion_tokens += 10

    requests, tokens = meter.rates()

    assert requests == pytest.approx(3.0)
    assert tokens == pytest.approx(10.0)


def test_the_time_before_the_work_began_does_not_slow_the_rate() -> None:
    meter = Meter()
    meter.sample(0.0)
    meter.forget_rates()
    meter.sample(60.0)
    meter.completed += 10
    meter.sample(62.0)

    assert meter.rates()[0] == pytest.approx(5.0)


@pytest.mark.parametrize("samples", [0, 1])
def test_with_less_than_two_samples_there_is_no_rate(samples: int) -> None:
    meter = Meter()
    for second in range(samples):
        meter.sample(float(second))

    assert meter.rates() == (0.0, 0.0)


def test_samples_older_than_the_window_are_forgotten() -> None:
    meter = Meter()
    meter.sample(0.0)
    meter.completed += 1_000
    meter.sample(1.0)
    meter.sample(2.0 + WINDOW_SECONDS)
    meter.sample(3.0 + WINDOW_SECONDS)

    assert meter.rates()[0] == 0.0
