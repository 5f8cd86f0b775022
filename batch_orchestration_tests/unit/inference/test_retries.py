"""When a failed request is sent again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.core.outcomes import RETRYABLE, Failure, FailureCode
from batch_orchestration.inference.faults.retries import RetryPolicy, retry_delay

POLICY = RetryPolicy(max_attempts=4, base_delay_seconds=1.0, max_delay_seconds=3.0)


def failure(code: FailureCode, retry_after: float | None = None) -> Failure:
    return Failure(code=code, message="", retry_after_seconds=retry_after)


@pytest.mark.parametrize("code", sorted(set(FailureCode) - RETRYABLE))
def test_what_the_author_must_mend_is_never_sent_again(code: FailureCode) -> None:
    assert retry_delay(failure(code), attempts=1, policy=POLICY, jitter=0.5) is None


@pytest.mark.parametrize("code", sorted(RETRYABLE))
@pytest.mark.parametrize(
    ("attempts", "longest"), [(1, 1.0), (2, 2.0), (3, 3.0)], ids=["1st", "2nd", "3rd"]
)
def test_the_engines_trouble_is_retried_ever_later_up_to_a_limit(
    code: FailureCode, attempts: int, longest: float
) -> None:
    delay = retry_delay(failure(code), attempts=attempts, policy=POLICY, jitter=0.999_999)

    assert delay == pytest.approx(longest, rel=1e-3)


@pytest.mark.parametrize("code", sorted(RETRYABLE))
def test_after_the_last_attempt_it_is_given_up(code: FailureCode) -> None:
    assert retry_delay(failure(code), attempts=4, policy=POLICY, jitter=0.5) is None


def test_an_engine_that_asks_for_time_gets_it() -> None:
    overloaded = failure(FailureCode.ENGINE_OVERLOADED, retry_after=20.0)

    assert retry_delay(overloaded, attempts=1, policy=POLICY, jitter=0.5) == 20.0


@pytest.mark.parametrize("asked", [601.0, 31_536_000.0, 1e300, float("inf")])
def test_an_engine_gets_no_more_time_than_the_limit(asked: float) -> None:
    overloaded = failure(FailureCode.ENGINE_OVERLOADED, retry_after=asked)

    assert retry_delay(overloaded, attempts=1, policy=POLICY, jitter=0.5) == 600.0


@pytest.mark.parametrize("asked", [float("nan"), -5.0, float("-inf")])
def test_a_wait_that_is_none_changes_nothing(asked: float) -> None:
    overloaded = failure(FailureCode.ENGINE_OVERLOADED, retry_after=asked)

    assert retry_delay(overloaded, attempts=1, policy=POLICY, jitter=0.5) == 0.5


def test_a_request_is_asked_again_before_its_batch_is_over() -> None:
    overloaded = failure(FailureCode.ENGINE_OVERLOADED, retry_after=500.0)

    def delay(seconds_left: float) -> float | None:
        return retry_delay(
            overloaded, attempts=1, policy=POLICY, jitter=0.5, seconds_left=seconds_left
        )

    assert delay(5_000.0) == 500.0
    assert delay(400.0) == 200.0
    assert delay(-1.0) == 0.5


@given(st.integers(1, 5_000), st.floats(0, 1, exclude_max=True))
def test_a_delay_is_never_negative_nor_above_the_maximum(attempts: int, jitter: float) -> None:
    policy = RetryPolicy(max_attempts=10_000, base_delay_seconds=0.5, max_delay_seconds=30)

    delay = retry_delay(
        failure(FailureCode.TIMEOUT), attempts=attempts, policy=policy, jitter=jitter
    )

    assert delay is not None
    assert 0 <= delay <= 30
