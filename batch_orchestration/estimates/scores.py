"""The accuracy of estimates: estimated against actual values, of one batch and of several."""

import statistics
from collections.abc import Sequence

import msgspec

from batch_orchestration.estimates.estimate import Estimate


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """The estimate of a batch, and its actual tokens and time.

    Attributes:
        actual_seconds: Time during which the engine had at least one request of the batch.
    """

    batch_id: str
    scored_at: float
    estimate: Estimate
    actual_prompt_tokens: int
    actual_completion_tokens: int
    actual_seconds: float

    @property
    def actual_tokens(self) -> int:
        """Actual tokens in total, prompts and answers."""
        return self.actual_prompt_tokens + self.actual_completion_tokens

    @property
    def error(self) -> float | None:
        """|estimate - actual| / actual of the seconds; None if either is missing."""
        expected = self.estimate.seconds
        if expected is None or self.actual_seconds <= 0:
            return None
        return abs(expected.mid - self.actual_seconds) / self.actual_seconds

    @property
    def inside(self) -> bool | None:
        """Whether the actual seconds are within the band."""
        expected = self.estimate.seconds
        return None if expected is None else expected.holds(self.actual_seconds)

    @property
    def token_error(self) -> float | None:
        """|estimate - actual| / actual of the tokens, prompts and answers together."""
        actual = self.actual_tokens
        return abs(self.estimate.tokens - actual) / actual if actual else None


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
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


def accuracy(scores: Sequence[Score]) -> Accuracy:
    """Return the accuracy of several estimates."""
    errors = [score.error for score in scores if score.error is not None]
    inside = [score.inside for score in scores if score.inside is not None]
    token_errors = [score.token_error for score in scores if score.token_error is not None]
    return Accuracy(
        batches=len(scores),
        with_seconds=len(errors),
        median_error=statistics.median(errors) if errors else None,
        inside=sum(inside) / len(inside) if inside else None,
        median_token_error=statistics.median(token_errors) if token_errors else None,
    )
