"""Estimates: bands have their coverage, caps apply, and history wins over priors."""

import random

import pytest

from batch_orchestration.estimates.estimate import (
    AnsweredRequest,
    Band,
    Basis,
    Estimate,
    TokenHistory,
    estimate,
)
from batch_orchestration.estimates.profile import SampledRequest, ShapeTotals, TokenProfile
from batch_orchestration_tests.support.estimates import make_throughput

LONG, UNCAPPED = "chat, text, long", "chat, text, uncapped"
FAST = make_throughput(spread=0.05, completion_token=0.01)


def make_profile(
    requests: int = 1000,
    *,
    shape: str = LONG,
    cap: int | None = 200,
    characters: int = 400,
    prompt_tokens: int | None = 110,
) -> TokenProfile:
    sampled = min(requests, 50)
    return TokenProfile(
        shapes={shape: ShapeTotals(requests=requests, size_bytes=requests * 600)},
        sample=tuple(
            SampledRequest(
                index=index,
                shape=shape,
                size_bytes=600,
                characters=characters,
                cap=cap,
                prompt_tokens=prompt_tokens,
            )
            for index in range(sampled)
        ),
    )


def make_history(lengths: list[int], *, shape: str = LONG, cut: bool = False) -> TokenHistory:
    return TokenHistory(
        [
            AnsweredRequest(
                shape=shape, characters=300, prompt_tokens=100, completion_tokens=length, cut=cut
            )
            for length in lengths
        ]
    )


def made(profile: TokenProfile, history: TokenHistory | None = None, **fields: object) -> Estimate:
    arguments = {"throughput": FAST, "at_a_time": 256, "seed": "s", **fields}
    return estimate(profile, history=history or TokenHistory(), **arguments)  # type: ignore[arg-type]


def test_the_same_file_always_gets_the_same_estimate() -> None:
    assert made(make_profile()) == made(make_profile())


@pytest.mark.parametrize(
    ("profile", "history", "basis", "tokens"),
    [
        (make_profile(), TokenHistory(), Basis.TOKENIZER, 110_000),
        (make_profile(prompt_tokens=None), make_history([9] * 9), Basis.LEARNED, 133_333),
        (make_profile(prompt_tokens=None), TokenHistory(), Basis.CHARACTERS, 130_000),
    ],
)
def test_prompt_tokens_come_from_the_best_basis_and_it_is_named(
    profile: TokenProfile, history: TokenHistory, basis: Basis, tokens: int
) -> None:
    found = made(profile, history)

    assert found.basis is basis
    assert found.prompt_tokens.mid == pytest.approx(tokens, rel=0.05)


def test_history_of_the_shape_wins_over_the_prior() -> None:
    found = made(make_profile(), make_history([10, 20, 30, 40, 50]))

    assert found.completion_tokens.mid == pytest.approx(30_000, rel=0.1)
    assert found.from_history == 1.0
    assert made(make_profile()).from_history == 0.0


def test_history_of_another_shape_is_not_used() -> None:
    elsewhere = make_history([1] * 50, shape="chat, JSON, long")
    found, without = made(make_profile(), elsewhere), made(make_profile())

    assert found.completion_tokens == without.completion_tokens


def test_answers_end_at_their_cap_and_cut_ones_are_expected_to_be_longer_under_a_higher_cap() -> (
    None
):
    capped = made(make_profile(cap=70), make_history([500] * 20))
    longer = made(make_profile(cap=1000), make_history([100] * 20, cut=True))

    assert capped.completion_tokens.high <= 70_000
    assert longer.completion_tokens.mid == pytest.approx(200_000, rel=0.1)


def test_one_token_and_embeddings_need_no_history() -> None:
    one = made(make_profile(shape="chat, text, one token", cap=1))
    none = made(make_profile(shape="embedding", cap=0))

    assert one.completion_tokens == Band(low=1000, mid=1000, high=1000)
    assert none.completion_tokens == Band(low=0, mid=0, high=0)
    assert one.from_history == none.from_history == 1.0


def test_the_band_is_wider_where_less_is_known() -> None:
    known = made(make_profile(), make_history([60, 70, 80, 90, 100] * 10)).seconds
    unknown = made(make_profile(shape=UNCAPPED, cap=None)).seconds

    assert known is not None
    assert unknown is not None
    assert known.high / known.low < unknown.high / unknown.low
    assert known.low < known.mid < known.high


def test_nine_of_ten_batches_drawn_from_history_are_not_above_the_band() -> None:
    """And eight of ten are within it, or nearly."""
    dice = random.Random(7)
    lengths = [dice.randint(5, 120) for _ in range(500)]
    band = made(make_profile(), make_history(lengths)).completion_tokens
    actual = [
        sum(dice.choices(lengths, k=1000)) * dice.lognormvariate(0.0, 0.15) for _ in range(300)
    ]

    inside = sum(band.holds(value) for value in actual) / len(actual)
    assert 0.68 < inside < 0.92


def test_without_a_measurement_there_are_tokens_but_no_seconds() -> None:
    found = made(make_profile(), throughput=None)

    assert found.seconds is None
    assert found.tokens > 0
    assert found.until_done is None
    assert not found.cannot_meet_window


def test_a_batch_of_one_request_is_bounded_by_its_answer_not_by_the_window() -> None:
    slow_steps = make_throughput(spread=0.01, step=1.0)

    found = made(make_profile(1, cap=50), make_history([50] * 9), throughput=slow_steps)

    assert found.seconds is not None
    assert found.seconds.mid == pytest.approx(50, rel=0.2)


def test_the_work_of_each_shape_is_expected_for_the_remaining_time() -> None:
    found = made(make_profile(), make_history([30] * 20))

    ((shape, work),) = found.shapes.items()
    assert (shape, work.requests, work.prompt_tokens) == (LONG, 1000, 110_000)
    assert work.completion_tokens == pytest.approx(30_000, rel=0.1)
    assert work.steps == pytest.approx(work.completion_tokens / 256)
