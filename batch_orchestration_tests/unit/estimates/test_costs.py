"""Throughput: known costs are found again, and uncertainty shrinks with measurements."""

import itertools

import msgspec
import pytest

from batch_orchestration.estimates.costs import (
    SPREAD_FITTED,
    Costs,
    Measurement,
    Source,
    Throughput,
    Work,
    throughput,
    work_alone,
)
from batch_orchestration_tests.support.estimates import make_measurement

TRUTH = Costs(request=0.01, prompt_token=0.0005, completion_token=0.004, step=0.02)


def measure(
    requests: int = 10,
    prompt: int = 100,
    answer: int = 20,
    *,
    factor: float = 1.0,
    source: Source = Source.HISTORY,
) -> Measurement:
    """A measurement of an engine with the true costs, times a factor."""
    measured = make_measurement(
        requests=requests,
        prompt_tokens=requests * prompt,
        completion_tokens=requests * answer,
        longest=answer,
        at_a_time=8,
        source=source,
    )
    return msgspec.structs.replace(measured, seconds=TRUTH.seconds(measured.work) * factor)


def fit(*measurements: Measurement) -> Throughput:
    found = throughput(measurements)
    assert found is not None
    return found


CALIBRATION = [
    measure(requests, prompt, answer, source=Source.CALIBRATION)
    for requests, prompt, answer in itertools.product((1, 40), (30, 600), (4, 64))
]


def test_costs_are_found_again_from_a_calibration() -> None:
    found = fit(*CALIBRATION)

    unseen = measure(requests=500, prompt=300, answer=30).work
    assert found.fitted
    assert found.costs.seconds(unseen) == pytest.approx(TRUTH.seconds(unseen), rel=0.05)
    assert found.spread >= SPREAD_FITTED  # A calibration alone reduces no uncertainty.


def test_an_engine_that_was_never_measured_has_no_throughput() -> None:
    assert throughput([]) is None


def test_a_single_measurement_scales_the_guessed_costs() -> None:
    measured = measure()

    found = fit(measured)

    assert not found.fitted
    assert found.costs.seconds(measured.work) == pytest.approx(measured.seconds)


def test_no_cost_is_negative_whatever_was_measured() -> None:
    odd = [
        msgspec.structs.replace(measure(answer=answer), seconds=seconds)
        for answer, seconds in ((1, 9.0), (2, 5.0), (50, 1.0), (100, 0.5))
    ]

    assert min(msgspec.structs.astuple(fit(*odd).costs)) >= 0


def test_runs_that_took_longer_than_a_calibration_predicts_correct_it() -> None:
    slow = [measure(n, factor=1.5) for n in (50, 80, 100, 200, 300, 400)]

    work = measure(250).work
    assert 1.2 < fit(*CALIBRATION, *slow).costs.seconds(work) / TRUTH.seconds(work) < 1.6


def test_agreeing_measurements_reduce_the_spread_and_scattered_ones_increase_it() -> None:
    agreeing = fit(*CALIBRATION, *[measure(n) for n in range(50, 60)])
    scattered = fit(*CALIBRATION, *[measure(50, factor=f) for f in (0.4, 2.5, 0.5, 2.0, 0.4, 2.5)])

    assert agreeing.spread < 0.15
    assert scattered.spread > 0.4


@pytest.mark.parametrize(
    ("requests", "tokens", "longest", "at_a_time", "steps"),
    [(10, 100, 60, 256, 60), (1000, 10_000, 60, 100, 100), (1, 30, 30, 256, 30)],
)
def test_steps_are_bounded_by_the_longest_answer_and_by_the_sequences_at_a_time(
    requests: int, tokens: int, longest: int, at_a_time: int, steps: float
) -> None:
    assert work_alone(
        requests=requests,
        prompt_tokens=0,
        completion_tokens=tokens,
        longest=longest,
        at_a_time=at_a_time,
    ) == Work(requests=requests, prompt_tokens=0, completion_tokens=tokens, steps=steps)
