"""The figures of a batch, added up."""

import pytest

from batch_orchestration.core.outcomes import FailureCode, Usage
from batch_orchestration.core.results import EXAMPLES_PER_CODE, BatchTotals
from batch_orchestration_tests.support.builders import (
    NOW,
    make_attempt,
    make_completion,
    make_failure,
    make_provenance,
    make_settled,
)


def tally_of(*requests):
    totals = BatchTotals()
    for request in requests:
        totals.count(request)
    return totals


def test_an_empty_tally_has_no_rates():
    totals = BatchTotals()

    assert (totals.total, totals.failure_rate, totals.run_seconds) == (0, 0.0, 0.0)
    assert (totals.requests_per_second, totals.output_tokens_per_second) == (0.0, 0.0)


def test_rates_run_from_the_first_submission_to_the_last_outcome():
    answer = make_completion(
        latency_seconds=2.0, usage=Usage(prompt_tokens=10, completion_tokens=40)
    )

    totals = tally_of(
        make_settled(0, answer, settled_at=NOW + 2),
        make_settled(1, answer, settled_at=NOW + 8),
        make_settled(2, make_failure(latency_seconds=1.0), settled_at=NOW + 10),
    )

    assert totals.run_seconds == pytest.approx(10)
    assert totals.requests_per_second == pytest.approx(0.3)
    assert totals.output_tokens_per_second == pytest.approx(8)
    assert totals.failure_rate == pytest.approx(1 / 3)


def test_failed_attempts_count_and_move_the_start():
    early = make_attempt(at=NOW - 30)

    totals = tally_of(make_settled(0, attempts=2, failed_attempts=(early,), settled_at=NOW))

    assert totals.attempts == 2
    assert totals.submitted == 1
    assert totals.first_at == NOW - 30


def test_refused_at_admission_asks_no_engine():
    refused = make_failure(FailureCode.INVALID_JSON, status=None, body=None, latency_seconds=0.0)

    totals = tally_of(make_settled(0, refused, attempts=0, provenance=make_provenance(engine="")))

    assert totals.submitted == 0
    assert totals.first_at is None
    assert not totals.engines


def test_only_the_first_examples_of_a_code_are_kept():
    totals = tally_of(*(make_settled(index, make_failure()) for index in range(100)))

    assert totals.failures_by_code == {"engine_refused": 100}
    kept = [example.custom_id for example in totals.examples["engine_refused"]]
    assert kept == [f"request-{index}" for index in range(EXAMPLES_PER_CODE)]


def test_one_simulated_answer_makes_a_batch_simulated():
    real = make_settled(0, provenance=make_provenance(engine="vllm"))

    assert not tally_of(real).simulated
    assert tally_of(real, make_settled(1)).simulated
