"""The accuracy of estimates: estimated against actual figures, of one batch and of several."""

import statistics
from collections.abc import Sequence

import msgspec

from batch_orchestration.estimates.estimate import Band, Basis


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Expected and actual figures of a batch.

    Attributes:
        expected_tokens: Completion tokens, as in `actual_tokens`.
        expected_seconds: None if the engine had not been measured at the time of the estimate.
        actual_seconds: Time during which the engine had at least one request of the batch.
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
        """|estimate - actual| / actual of the seconds; None if either is missing."""
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
        """|estimate - actual| / actual of the tokens, prompts and answers together."""
        actual = self.actual_prompt_tokens + self.actual_tokens
        expected = self.expected_prompt_tokens.mid + self.expected_tokens.mid
        return abs(expected - actual) / actual if actual else None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The accuracy of the estimates of several batches.

    Attributes:
        batches: Number of scored batches.
        with_seconds: Number of batches with an error of the seconds.
        median_error: Median error of the seconds.
        inside: Share of estimated times whose actual seconds are within the band; ideally 0.8.
        median_token_error: Median error of the tokens.
    """

    batches: int
    with_seconds: int
    median_error: float | None
    inside: float | None
    median_token_error: float | None


def calibration(scores: Sequence[Score]) -> Calibration:
    """Return the accuracy of several estimates."""
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
