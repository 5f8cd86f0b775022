"""When a batch will be done: by the tokens that are left, shape by shape."""

import pytest

from batch_orchestration.core.outcomes import Usage
from batch_orchestration.estimates.costs import Costs
from batch_orchestration.estimates.estimate import Band, Basis, Estimate, Expectation
from batch_orchestration.estimates.remaining import RemainingWork
from batch_orchestration_tests.support.builders import make_completion, make_failure

LABELS, ESSAYS = "chat, text, one token", "chat, text, long"
ANY = Band(low=1, mid=1, high=1)


def make_remaining(*, essays_expected: float = 1000.0) -> RemainingWork:
    """100 labels come first in the file, then 100 essays; only written tokens cost anything."""
    return RemainingWork(
        Estimate(
            requests=200,
            prompt_tokens=ANY,
            completion_tokens=ANY,
            basis=Basis.TOKENIZER,
            seconds=None,
            costs=Costs(request=0.0, prompt_token=0.0, completion_token=1.0, step=0.0),
            expectations={
                LABELS: Expectation(
                    requests=100, prompt_tokens=9, completion_tokens=1, from_history=True
                ),
                ESSAYS: Expectation(
                    requests=100,
                    prompt_tokens=9,
                    completion_tokens=essays_expected,
                    from_history=False,
                ),
            },
        )
    )


def answer(remaining: RemainingWork, shape: str, tokens: int, times: int = 1) -> None:
    for _ in range(times):
        usage = Usage(prompt_tokens=9, completion_tokens=tokens)
        remaining.count(shape, make_completion(usage=usage))


def test_nothing_is_said_before_the_first_answer() -> None:
    remaining = make_remaining()
    remaining.begin(0.0)
    remaining.sample(1.0)

    assert remaining.seconds_left(200) is None
    assert remaining.seconds_left(0) == 0.0


def test_long_answers_that_are_left_are_not_taken_for_short_ones_that_are_done() -> None:
    remaining = make_remaining()
    remaining.begin(0.0)
    answer(remaining, LABELS, 1, times=100)
    remaining.sample(10.0)  # ten tokens a second; by requests, 10 s would be left

    assert remaining.seconds_left(100) == pytest.approx(100 * 1000 / 10)


def test_what_is_seen_of_a_shape_replaces_what_was_expected_of_it() -> None:
    remaining = make_remaining()
    remaining.begin(0.0)
    answer(remaining, LABELS, 1, times=100)
    answer(remaining, ESSAYS, 50, times=50)
    remaining.sample(100.0)  # 26 tokens a second

    left = remaining.seconds_left(50)

    assert left is not None
    # 50 seen at 50 tokens, against 5 expected at 1,000.
    each = (50 * 50 + 5 * 1000) / 55
    assert left == pytest.approx(50 * each / 26)


def test_what_other_runs_have_done_is_taken_to_be_like_what_is_left() -> None:
    remaining = make_remaining()
    remaining.begin(0.0)
    answer(remaining, LABELS, 1, times=100)
    remaining.sample(10.0)

    assert remaining.seconds_left(50) == pytest.approx(50 * 1000 / 10)


def test_a_batch_that_was_not_profiled_to_the_end_still_ends() -> None:
    remaining = make_remaining()
    remaining.begin(0.0)
    answer(remaining, LABELS, 1, times=100)
    answer(remaining, ESSAYS, 9, times=100)
    remaining.sample(10.0)

    assert remaining.seconds_left(10) == pytest.approx(10 * 5 / 100)


def test_a_failure_counts_as_done_and_as_no_work() -> None:
    remaining = make_remaining()
    remaining.begin(0.0)
    remaining.count(ESSAYS, make_failure())
    answer(remaining, LABELS, 1, times=10)
    remaining.sample(10.0)

    left = remaining.seconds_left(189)

    assert left is not None
    assert left < 189 * 1000


def test_the_speed_is_that_of_the_last_minutes() -> None:
    remaining = make_remaining()
    remaining.begin(0.0)
    answer(remaining, ESSAYS, 1000, times=1)
    remaining.sample(1.0)
    for second in range(2, 400):
        answer(remaining, ESSAYS if second % 100 == 0 else LABELS, 1)
        remaining.sample(float(second))

    left = remaining.seconds_left(10)

    assert left is not None
    assert left > 1000
