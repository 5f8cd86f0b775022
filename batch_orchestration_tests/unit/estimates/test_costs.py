"""Throughput: costs that were there are found again, and uncertainty shrinks with measurements."""

import itertools

import pytest

from batch_orchestration.estimates.costs import (
    SPREAD_FITTED,
    Costs,
    Measurement,
    Source,
    Work,
    steps,
    throughput,
)

TRUTH = Costs(request=0.01, prompt_token=0.0005, completion_token=0.004, step=0.02)


def make_work(requests: int = 10, prompt: int = 100, answer: int = 20, at_a_time: int = 8) -> Work:
    completion = requests * answer
    return Work(
        requests=requests,
        prompt_tokens=requests * prompt,
        completion_tokens=completion,
        steps=steps(
            requests=requests, completion_tokens=completion, longest=answer, at_a_time=at_a_time
        ),
    )


def measure(work: Work, *, factor: float = 1.0, source: Source = Source.HISTORY) -> Measurement:
    return Measurement(work=work, seconds=TRUTH.seconds(work) * factor, source=source)


CALIBRATION = [
    measure(make_work(requests, prompt, answer), source=Source.CALIBRATION)
    for requests, prompt, answer in itertools.product((1, 40), (30, 600), (4, 64))
]


def test_costs_are_found_again_from_a_calibration() -> None:
    found = throughput(CALIBRATION)

    assert found is not None
    assert found.fitted
    unseen = make_work(requests=500, prompt=300, answer=30)
    assert found.costs.seconds(unseen) == pytest.approx(TRUTH.seconds(unseen), rel=0.05)


def test_nothing_is_known_of_an_engine_that_was_never_measured() -> None:
    assert throughput([]) is None


def test_a_single_measurement_scales_what_is_guessed() -> None:
    work = make_work()

    found = throughput([measure(work)])

    assert found is not None
    assert not found.fitted
    assert found.costs.seconds(work) == pytest.approx(TRUTH.seconds(work))


def test_no_cost_is_negative_whatever_was_measured() -> None:
    odd = [
        Measurement(work=make_work(answer=answer), seconds=seconds, source=Source.HISTORY)
        for answer, seconds in ((1, 9.0), (2, 5.0), (50, 1.0), (100, 0.5))
    ]

    found = throughput(odd)

    assert found is not None
    assert min(found.costs.request, found.costs.prompt_token) >= 0
    assert min(found.costs.completion_token, found.costs.step) >= 0


def test_runs_that_took_longer_than_a_calibration_says_correct_it() -> None:
    slow = [measure(make_work(requests=n), factor=1.5) for n in (50, 80, 100, 200, 300, 400)]

    found = throughput([*CALIBRATION, *slow])

    work = make_work(requests=250)
    assert found is not None
    assert 1.2 < found.costs.seconds(work) / TRUTH.seconds(work) < 1.6


def test_agreeing_measurements_make_it_surer_and_scattered_ones_less_sure() -> None:
    agreeing = throughput([*CALIBRATION, *[measure(make_work(n)) for n in range(50, 60)]])
    scattered = throughput(
        [
            *CALIBRATION,
            *[measure(make_work(50), factor=factor) for factor in (0.4, 2.5, 0.5, 2.0, 0.4, 2.5)],
        ]
    )

    assert agreeing is not None
    assert scattered is not None
    assert agreeing.spread < 0.15
    assert scattered.spread > 0.4


def test_a_calibration_alone_makes_nothing_surer_than_it_is() -> None:
    found = throughput(CALIBRATION)

    assert found is not None
    assert found.spread >= SPREAD_FITTED


def test_steps_are_bounded_by_the_longest_answer_and_by_what_fits_at_a_time() -> None:
    assert steps(requests=10, completion_tokens=100, longest=60, at_a_time=256) == 60
    assert steps(requests=1000, completion_tokens=10_000, longest=60, at_a_time=100) == 100
    assert steps(requests=1, completion_tokens=30, longest=30, at_a_time=256) == 30
