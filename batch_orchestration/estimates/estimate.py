"""Estimates the tokens, seconds and price of a batch as bands, from its profile and history.

A band is the 10th, 50th and 90th percentile of 400 seeded draws: the same inputs always give the
same estimate.
"""

import math
import random
from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from batch_orchestration.core.text import duration
from batch_orchestration.estimates.costs import Costs, Throughput, Work, work_alone, work_shared
from batch_orchestration.estimates.profile import (
    EMBEDDING,
    SampledRequest,
    ShapeTotals,
    TokenProfile,
)

DRAWS = 400
#: Requests drawn per shape; their mean represents the whole shape.
DRAWN_REQUESTS = 64
#: OpenAI's rule of thumb for English text.
CHARACTERS_PER_TOKEN = 4.0
#: Tokens that a chat template adds to a conversation, if they cannot be counted.
TEMPLATE_TOKENS = 30
#: With fewer answers of a shape, the prior is used instead of history.
FEWEST_ANSWERS = 5
#: Factor on the length of an answer that was cut at its cap: its full length is unknown.
CUT_ANSWERS_GO_ON = 2
#: Standard deviation of log(answer length of a whole batch / expected length), with an expectation
#: from history and from the prior.
BATCH_SPREAD, PRIOR_SPREAD = 0.15, 0.40
#: Prior of capped answers: deciles of the share of the cap that an answer uses.
PRIOR_SHORT = (0.15, 0.25, 0.4, 0.5, 0.65, 0.8, 1.0, 1.0, 1.0, 1.0)
PRIOR_LONG = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 1.0)
#: Prior of uncapped answers: deciles of their tokens.
PRIOR_UNCAPPED = (20, 50, 90, 140, 200, 280, 380, 500, 750, 1200)


class Band(msgspec.Struct, frozen=True, kw_only=True):
    """An uncertain figure: in one case of ten below `low`, and in one of ten above `high`."""

    low: float
    mid: float
    high: float

    def scaled(self, factor: float) -> "Band":
        """Return the band multiplied by a factor."""
        return Band(low=self.low * factor, mid=self.mid * factor, high=self.high * factor)

    def shifted(self, by: float) -> "Band":
        """Return the band with a certain amount added."""
        return Band(low=self.low + by, mid=self.mid + by, high=self.high + by)

    def holds(self, value: float) -> bool:
        """Whether the band contains a value."""
        return self.low <= value <= self.high


class Basis(StrEnum):
    """The basis of a count of prompt tokens."""

    TOKENIZER = "tokenizer"
    LEARNED = "learned ratio"
    CHARACTERS = "4 characters a token"


#: Standard deviation of log(prompt tokens of a whole batch / expected tokens), by their basis.
PROMPT_SPREAD = {Basis.TOKENIZER: 0.02, Basis.LEARNED: 0.08, Basis.CHARACTERS: 0.25}


class AnsweredRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A sampled request of a finished batch; `cut` if its answer ended at its cap."""

    shape: str
    characters: int
    prompt_tokens: int
    completion_tokens: int
    cut: bool


class TokenHistory:
    """Answer lengths and token ratio of a model, learned from its finished batches."""

    def __init__(self, answered: Sequence[AnsweredRequest] = ()) -> None:
        self._answers: dict[str, list[tuple[int, bool]]] = {}
        characters = tokens = 0
        for request in answered:
            answers = self._answers.setdefault(request.shape, [])
            answers.append((request.completion_tokens, request.cut))
            characters += request.characters
            tokens += request.prompt_tokens
        #: None before the first batch of the model.
        self.tokens_per_character = tokens / characters if characters and tokens else None

    def answers(self, shape: str) -> Sequence[tuple[int, bool]]:
        """Return answer lengths of a shape, and whether each answer was cut; empty if too few."""
        known = self._answers.get(shape, ())
        return known if len(known) >= FEWEST_ANSWERS else ()


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Expected tokens, time and price of a batch.

    Attributes:
        requests: Usable requests of the batch.
        seconds: Time from the first submission to the last answer, with the engine to itself; None
            if the engine was never measured.
        start_seconds: Start-up time of an engine that is not running; None if not measured.
        ahead_seconds: Time until the batches ahead of it are done.
        window_seconds: Length of its completion window.
        from_history: Share of the requests whose answer length is known from history.
        measurements: Number of speed measurements behind `seconds`.
        costs: Used by `RemainingWork` while the batch runs, as is `shapes`.
        shapes: Expected work of the requests of each shape, among those of the others.
        price: Price of the device for `seconds`; None if no price is set.
        engine: Key of the engine's measurements; empty if unknown.
        at_a_time: Most requests that the engine computes together.
    """

    requests: int
    prompt_tokens: Band
    completion_tokens: Band
    basis: Basis
    seconds: Band | None
    start_seconds: float | None = None
    ahead_seconds: float = 0.0
    window_seconds: float | None = None
    from_history: float = 0.0
    measurements: int = 0
    costs: Costs | None = None
    shapes: dict[str, Work] = {}
    price: Band | None = None
    engine: dict[str, str] = {}
    at_a_time: int = 1
    created_at: float = 0.0

    @property
    def tokens(self) -> int:
        """Expected tokens in total, prompts and answers."""
        return round(self.prompt_tokens.mid + self.completion_tokens.mid)

    @property
    def until_done(self) -> Band | None:
        """Seconds from admission to the last answer: queue, engine start and work."""
        if self.seconds is None:
            return None
        return self.seconds.shifted(self.ahead_seconds + (self.start_seconds or 0.0))

    @property
    def cannot_meet_window(self) -> bool:
        """Whether even the low end of the band exceeds the completion window."""
        done, window = self.until_done, self.window_seconds
        return done is not None and window is not None and done.low > window

    @property
    def may_miss_window(self) -> bool:
        """Whether the batch will more likely than not miss its completion window."""
        done, window = self.until_done, self.window_seconds
        return done is not None and window is not None and done.mid > window


class _ShapeModel:
    """The requests of one shape, from which token counts are drawn."""

    def __init__(
        self, totals: ShapeTotals, sample: Sequence[SampledRequest], history: TokenHistory
    ) -> None:
        self.requests = totals.requests
        self._sample = sample
        shape = sample[0].shape
        self._answers = history.answers(shape)
        certain = shape == EMBEDDING or "one token" in shape
        self.from_history = bool(self._answers) or certain
        self.spread = 0.0 if certain else BATCH_SPREAD if self.from_history else PRIOR_SPREAD
        size = sum(request.size_bytes for request in sample) or 1
        tokens = sum(_prompt_tokens(request, history) for request in sample)
        #: Scaled by bytes, which are known for all requests, so long ones outside the sample count.
        self.prompt_tokens = tokens / size * totals.size_bytes

    def draw(self, dice: random.Random) -> tuple[float, float]:
        """Return the tokens of all answers, and of the longest one."""
        drawn = [self._answer(dice) for _ in range(min(self.requests, DRAWN_REQUESTS))]
        if not drawn:
            return 0.0, 0.0
        factor = math.exp(dice.gauss(0.0, self.spread))
        most = max(request.cap or math.inf for request in self._sample)
        mean = sum(min(tokens * factor, cap) for tokens, cap in drawn) / len(drawn)
        return mean * self.requests, min(max(tokens for tokens, _ in drawn) * factor, most)

    def work(self, *, completion_tokens: float, at_a_time: int) -> Work:
        """Return the expected work of the requests, with this mean of the drawn tokens."""
        return work_shared(
            requests=self.requests,
            prompt_tokens=round(self.prompt_tokens, 2),
            completion_tokens=round(completion_tokens, 2),
            at_a_time=at_a_time,
        )

    def _answer(self, dice: random.Random) -> tuple[float, float]:
        """Return the tokens of one answer, and its cap."""
        request = dice.choice(self._sample)
        cap = math.inf if request.cap is None else float(request.cap * request.answers)
        if cap <= request.answers:
            return cap, cap
        if self._answers:
            tokens, cut = dice.choice(self._answers)
            return min(cap, tokens * (CUT_ANSWERS_GO_ON if cut else 1)), cap
        if request.cap is None:
            return float(dice.choice(PRIOR_UNCAPPED) * request.answers), cap
        shares = PRIOR_SHORT if "short" in request.shape else PRIOR_LONG
        return max(1.0, dice.choice(shares) * cap), cap


def estimate(
    profile: TokenProfile,
    *,
    history: TokenHistory,
    throughput: Throughput | None,
    at_a_time: int,
    seed: str = "",
) -> Estimate:
    """Return the estimate of a batch that has the engine to itself.

    Args:
        history: History of the model that answers.
        throughput: Speed of the engine on its device and memory level; None if never measured.
        at_a_time: Most requests that the engine computes together.
        seed: Seed of the draws.
    """
    models, basis = _models(profile, history), _basis(profile, history)
    dice = random.Random(seed)
    prompt = sum(model.prompt_tokens for model in models.values())
    prompts, answers, seconds = [], [], []
    sums = dict.fromkeys(models, 0.0)
    for _ in range(DRAWS):
        drawn = {shape: model.draw(dice) for shape, model in models.items()}
        for shape, (tokens, _) in drawn.items():
            sums[shape] += tokens / DRAWS
        answers.append(sum(tokens for tokens, _ in drawn.values()))
        prompts.append(prompt * math.exp(dice.gauss(0.0, PROMPT_SPREAD[basis])))
        if throughput is not None:
            longest = max((longest for _, longest in drawn.values()), default=0.0)
            work = work_alone(
                requests=profile.requests,
                prompt_tokens=prompts[-1],
                completion_tokens=answers[-1],
                longest=longest,
                at_a_time=at_a_time,
            )
            factor = math.exp(dice.gauss(0.0, throughput.spread))
            seconds.append(throughput.costs.seconds(work) * factor)
    known = sum(model.requests for model in models.values() if model.from_history)
    return Estimate(
        requests=profile.requests,
        prompt_tokens=_band(prompts),
        completion_tokens=_band(answers),
        basis=basis,
        seconds=_band(seconds) if seconds else None,
        from_history=known / profile.requests if profile.requests else 0.0,
        measurements=0 if throughput is None else throughput.measurements,
        costs=None if throughput is None else throughput.costs,
        shapes={
            shape: model.work(completion_tokens=sums[shape], at_a_time=at_a_time)
            for shape, model in models.items()
        },
        at_a_time=at_a_time,
    )


def _models(profile: TokenProfile, history: TokenHistory) -> Mapping[str, _ShapeModel]:
    by_shape: dict[str, list[SampledRequest]] = {}
    for request in profile.sample:
        by_shape.setdefault(request.shape, []).append(request)
    return {
        shape: _ShapeModel(totals, by_shape[shape], history)
        for shape, totals in profile.shapes.items()
        if totals.requests and shape in by_shape
    }


def _prompt_tokens(request: SampledRequest, history: TokenHistory) -> float:
    if request.prompt_tokens is not None:
        return request.prompt_tokens
    if history.tokens_per_character is not None:
        # The ratio includes the tokens that the template adds.
        return request.characters * history.tokens_per_character
    template = TEMPLATE_TOKENS if request.shape.startswith("chat") else 0
    return request.characters / CHARACTERS_PER_TOKEN + template


def _basis(profile: TokenProfile, history: TokenHistory) -> Basis:
    if profile.sample and all(r.prompt_tokens is not None for r in profile.sample):
        return Basis.TOKENIZER
    return Basis.CHARACTERS if history.tokens_per_character is None else Basis.LEARNED


def _band(draws: Sequence[float]) -> Band:
    ordered = sorted(draws)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return Band(low=at(0.1), mid=at(0.5), high=at(0.9))


def seconds_band(band: Band) -> str:
    """Format a band of seconds: `3 min 20 s (2 min 50 s to 4 min 5 s)`."""
    return f"{duration(band.mid)} ({duration(band.low)} to {duration(band.high)})"


def tokens_band(band: Band) -> str:
    """Format a band of tokens: `1,200 (900 to 1,800)`."""
    return f"{band.mid:,.0f} ({band.low:,.0f} to {band.high:,.0f})"


def estimate_rows(estimate: Estimate) -> list[tuple[str, str]]:
    """Return the rows of a table of the estimate, as names and texts.

    An unknown time is shown as such, not left out.
    """
    time = "unknown: the engine was never measured; run the job benchmark_engine"
    if estimate.seconds is not None:
        time = seconds_band(estimate.seconds)
        time += f", from {estimate.measurements:,} measurements"
    if estimate.start_seconds is not None:
        time += f"; engine start {duration(estimate.start_seconds)}"
    answers = f"{tokens_band(estimate.completion_tokens)}, {estimate.from_history:.0%} from history"
    rows = [
        ("Expected prompt tokens", f"{tokens_band(estimate.prompt_tokens)} by {estimate.basis}"),
        ("Expected completion tokens", answers),
        ("Expected time", time),
    ]
    if estimate.price is not None:
        price = estimate.price
        rows.append(("Expected price", f"{price.mid:,.2f} ({price.low:,.2f} to {price.high:,.2f})"))
    if warning := window_warning(estimate):
        rows.append(("Warning", warning))
    return rows


def window_warning(estimate: Estimate) -> str | None:
    """Return a warning if the completion window may be missed; None otherwise."""
    done = estimate.until_done
    if done is None or estimate.window_seconds is None or not estimate.may_miss_window:
        return None
    modal = "cannot" if estimate.cannot_meet_window else "may not"
    return (
        f"by its estimate, the batch {modal} end within its completion window of"
        f" {duration(estimate.window_seconds)}: it takes {duration(done.low)} to"
        f" {duration(done.high)}, including {duration(estimate.ahead_seconds)} behind other batches"
    )
