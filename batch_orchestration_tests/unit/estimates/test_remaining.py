"""The remaining time of a batch, by the remaining tokens of each shape."""

import pytest

from batch_orchestration.core.outcomes import Usage
from batch_orchestration.estimates.costs import Work
from batch_orchestration.estimates.remaining import RemainingWork
from batch_orchestration_tests.support.builders import make_completion, make_failure
from batch_orchestration_tests.support.estimates import make_costs, make_estimate

LABELS, ESSAYS = "chat, text, one token", "chat, text, long"


@pytest.fixture
def remaining() -> RemainingWork:
    """100 labels come first in the file, then 100 essays; only generated tokens cost anything."""
    works = {
        shape: Work(requests=100, prompt_tokens=900, completion_tokens=100 * tokens, steps=0)
        for shape, tokens in ((LABELS, 1), (ESSAYS, 1000))
    }
    tracked = RemainingWork(
        make_estimate(requests=200, costs=make_costs(completion_token=1.0), shapes=works)
    )
    tracked.begin(0.0)
    return tracked


def answer(remaining: RemainingWork, shape: str, tokens: int, times: int = 1) -> None:
    for _ in range(times):
        usage = Usage(prompt_tokens=9, completion_tokens=tokens)
        remaining.count(shape, make_completion(usage=usage))


def test_the_time_is_unknown_before_the_first_answer(remaining: RemainingWork) -> None:
    remaining.sample(1.0)

    assert remaining.seconds_left(200) is None
    assert remaining.seconds_left(0) == 0.0


@pytest.mark.parametrize("pending", [100, 50])
def test_remaining_long_answers_are_not_taken_for_the_short_ones_before(
    remaining: RemainingWork, pending: int
) -> None:
    """Outcomes of other runs are assumed to be like the remaining ones."""
    answer(remaining, LABELS, 1, times=100)
    remaining.sample(10.0)  # ten tokens a second; by requests, 10 s would be left

    assert remaining.seconds_left(pending) == pytest.approx(pending * 1000 / 10)


def test_answers_of_a_shape_replace_its_expectation(remaining: RemainingWork) -> None:
    answer(remaining, LABELS, 1, times=100)
    answer(remaining, ESSAYS, 50, times=50)
    remaining.sample(100.0)  # 26 tokens a second

    # 50 seen at 50 tokens, against 5 expected at 1,000.
    each = (50 * 50 + 5 * 1000) / 55
    assert remaining.seconds_left(50) == pytest.approx(50 * each / 26)


def test_requests_beyond_the_profile_take_as_long_as_the_answered_ones(
    remaining: RemainingWork,
) -> None:
    answer(remaining, LABELS, 1, times=100)
    answer(remaining, ESSAYS, 9, times=100)
    remaining.sample(10.0)

    assert remaining.seconds_left(10) == pytest.approx(10 * 5 / 100)


def test_a_failure_counts_as_done_and_as_no_work(remaining: RemainingWork) -> None:
    remaining.count(ESSAYS, make_failure())
    answer(remaining, LABELS, 1, times=10)
    remaining.sample(10.0)

    assert 0 < (remaining.seconds_left(189) or 0) < 189 * 1000


def test_the_speed_is_that_of_the_last_minutes(remaining: RemainingWork) -> None:
    answer(remaining, ESSAYS, 1000)
    remaining.sample(1.0)
    for second in range(2, 400):
        answer(remaining, ESSAYS if second % 100 == 0 else LABELS, 1)
        remaining.sample(float(second))

    assert (remaining.seconds_left(10) or 0) > 1000
