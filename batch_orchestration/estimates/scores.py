"""How good estimates were: estimate against actual, batch by batch and over the last of them."""

import statistics
from collections.abc import Sequence

import msgspec

from batch_orchestration.estimates.estimate import Band, Basis


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """An estimate beside what the batch took.

    Attributes:
        scored_at: POSIX seconds.
        expected_tokens: Of all answers.
        actual_tokens: The same.
        expected_seconds: None where the engine had never been measured when it was estimated.
        actual_seconds: During which the engine had at least one request of the batch.
    """

    batch_id: str
    scored_at: float
    requests: int
    basis: Basis
    expected_prompt_tokens: Band
    actual_prompt_tokens: int
    expected_tokens: Band
    actual_tokens: int
    expected_seconds: Band | None
    actual_seconds: float

    @property
    def error(self) -> float | None:
        """|estimate - actual| / actual of the seconds; None where there is nothing to compare."""
        if self.expected_seconds is None or self.actual_seconds <= 0:
            return None
        return abs(self.expected_seconds.mid - self.actual_seconds) / self.actual_seconds

    @property
    def inside(self) -> bool | None:
        """Whether the actual seconds are within the band."""
        expected = self.expected_seconds
        return None if expected is None else expected.holds(self.actual_seconds)

    @property
    def token_error(self) -> float | None:
        """The same of prompt and answer tokens together."""
        actual = self.actual_prompt_tokens + self.actual_tokens
        expected = self.expected_prompt_tokens.mid + self.expected_tokens.mid
        return abs(expected - actual) / actual if actual else None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """How estimates of the last batches were, taken together.

    Attributes:
        batches: Scored ones.
        with_seconds: Those whose seconds were estimated.
        median_error: Of the seconds.
        inside: Share of them whose seconds are within the band; 0.8 would be just right.
        median_token_error: Of the tokens.
    """

    batches: int
    with_seconds: int
    median_error: float | None
    inside: float | None
    median_token_error: float | None


def calibration(scores: Sequence[Score]) -> Calibration:
    """Return how good estimates were, taken together."""
    errors = [score.error for score in scores if score.error is not None]
    inside = [score.inside for score in scores if score.inside is not None]
    token_errors = [score.token_error for score in scores if score.token_error is not None]
    return Calibration(
        batches=len(scores),
        with_seconds=len(errors),
        median_error=statistics.median(errors) if errors else None,
        inside=sum(inside) / len(inside) if inside else None,
        median_token_error=statistics.median(token_errors) if token_errors else None,
    )
