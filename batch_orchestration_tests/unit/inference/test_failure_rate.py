"""When a batch pauses: too large a share of its latest outcomes are failures."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_orchestration.core.lifecycle import FailedRequest, Halt
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.inference.faults.failure_rate import (
    FIRST_OUTCOMES,
    LATEST_OUTCOMES,
    FailureRate,
    failed_request,
)


def a_failure(index: int = 0, message: str = "unknown parameter") -> FailedRequest:
    return FailedRequest(
        index=index, custom_id=f"request-{index}", code="engine_refused", message=message
    )


def rate_after(outcomes: str, *, most: float = 0.5) -> FailureRate:
    """After outcomes of which each letter is one: `x` a failure."""
    rate = FailureRate(most)
    for index, outcome in enumerate(outcomes):
        rate.record(a_failure(index) if outcome == "x" else None)
    return rate


@pytest.mark.parametrize(
    ("outcomes", "most", "exceeded"),
    [
        ("", 0.5, False),
        ("x" * 19, 0.5, False),
        ("x" * 20, 0.5, True),
        ("x" * 10 + "." * 10, 0.5, False),
        ("x" * 11 + "." * 9, 0.5, True),
        ("." * 19 + "x", 0.0, True),
        ("." * 20, 0.0, False),
        ("x" * 500, 1.0, False),
        # What is long ago is not judged, and a batch may go bad in its middle.
        ("x" * 11 + "." * 500, 0.5, False),
        ("." * 5000 + "x" * 50, 0.5, False),
        ("." * 5000 + "x" * 51, 0.5, True),
        ("x." * 2500, 0.5, False),
    ],
)
def test_more_than_the_share_of_the_latest_outcomes_pauses_a_batch(
    outcomes: str, most: float, exceeded: bool
) -> None:
    assert rate_after(outcomes, most=most).is_exceeded is exceeded


@given(st.text(alphabet=".x", max_size=400), st.floats(0, 1))
def test_it_is_exceeded_exactly_if_the_last_hundred_say_so(outcomes: str, most: float) -> None:
    latest = outcomes[-LATEST_OUTCOMES:]

    expected = len(latest) >= FIRST_OUTCOMES and latest.count("x") > most * len(latest)

    assert rate_after(outcomes, most=most).is_exceeded is expected


@given(st.lists(st.booleans(), max_size=150))
def test_what_earlier_runs_saw_counts_as_if_this_run_had_seen_it(failures: list[bool]) -> None:
    outcomes = [a_failure(n) if failed else None for n, failed in enumerate(failures)]
    half = len(outcomes) // 2
    whole, continued = FailureRate(0.5), FailureRate(0.5, outcomes[:half])
    for outcome in outcomes:
        whole.record(outcome)
    for outcome in outcomes[half:]:
        continued.record(outcome)

    assert whole.halt(at=1.0, actor="run") == continued.halt(at=1.0, actor="run")


def test_the_commonest_reason_is_told_with_three_examples() -> None:
    rate = rate_after("." * 10)
    for index in range(12):
        rate.record(a_failure(index, message=f"{index} tokens are too many, 4096 may be"))
    for index in range(12, 16):
        rate.record(a_failure(index, message="unknown parameter"))

    halt = rate.halt(at=1.0, actor="run-1")

    assert (halt.failed, halt.judged, halt.alike) == (16, 26, 12)
    assert [one.custom_id for one in halt.examples] == ["request-0", "request-1", "request-2"]
    assert halt.reason == (
        "16 of its latest 26 requests failed, more than 50% (max_failure_rate);"
        " 12 of them as engine_refused: 0 tokens are too many, 4096 may be"
    )


@given(st.text(max_size=2000, alphabet=st.characters(exclude_categories=())))
def test_whatever_an_engine_says_can_be_kept(message: str) -> None:
    failure = Failure(code=FailureCode.ENGINE_REFUSED, message=message)
    rate = FailureRate(0.0)
    for index in range(FIRST_OUTCOMES):
        rate.record(failed_request(index, None, failure))
    halt = rate.halt(at=1.0, actor="run-1")

    kept = msgspec.json.decode(msgspec.json.encode(halt), type=Halt)

    assert kept == halt
    assert "\n" not in kept.reason
    assert len(kept.examples[0].message) <= 300
