"""What a batch will take: tokens, seconds and money, with bands, from its profile and history.

A band is the 10th, 50th and 90th percentile of 400 seeded draws: the same inputs always give the
same estimate.
"""

import math
import random
from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from batch_orchestration.core.text import duration
from batch_orchestration.estimates.costs import Costs, Throughput, Work, steps
from batch_orchestration.estimates.profile import (
    EMBEDDING,
    SampledRequest,
    ShapeTotals,
    TokenProfile,
)

DRAWS = 400
#: Requests drawn of a shape; their mean stands for all of it.
DRAWN_REQUESTS = 64
#: English, by OpenAI's rule of thumb.
CHARACTERS_PER_TOKEN = 4.0
#: Tokens that a chat template adds to a conversation where nobody counted them.
TEMPLATE_TOKENS = 30
#: Fewer answers than these say too little about the next ones of their shape.
FEWEST_ANSWERS = 5
#: An answer that was cut at its cap would have gone on; how long, nobody knows.
CUT_ANSWERS_GO_ON = 2
#: How much a whole batch differs from what history (or, without one, the prior) says of its
#: shapes: standard deviation of the logarithm.
BATCH_SPREAD, PRIOR_SPREAD = 0.15, 0.40
#: The same for its prompts, by how they were counted.
TOKENIZED_SPREAD, LEARNED_SPREAD, GUESSED_SPREAD = 0.02, 0.08, 0.25
#: Without history: shares of their cap that answers use, one tenth of them each.
PRIOR_SHORT = (0.15, 0.25, 0.4, 0.5, 0.65, 0.8, 1.0, 1.0, 1.0, 1.0)
PRIOR_LONG = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0, 1.0)
#: Without history and without a cap: tokens, one tenth of the answers each.
PRIOR_UNCAPPED = (20, 50, 90, 140, 200, 280, 380, 500, 750, 1200)


class Band(msgspec.Struct, frozen=True, kw_only=True):
    """A figure that is not certain: one time in ten it is below `low`, one in ten above `high`."""

    low: float
    mid: float
    high: float

    def scaled(self, factor: float) -> "Band":
        """Return the band of a part, or of several times as much."""
        return Band(low=self.low * factor, mid=self.mid * factor, high=self.high * factor)

    def shifted(self, by: float) -> "Band":
        """Return the band with something certain added."""
        return Band(low=self.low + by, mid=self.mid + by, high=self.high + by)

    def holds(self, value: float) -> bool:
        """Whether the band contains a value."""
        return self.low <= value <= self.high


class Basis(StrEnum):
    """How prompt tokens were counted."""

    TOKENIZER = "tokenizer"
    LEARNED = "learned ratio"
    CHARACTERS = "4 characters a token"


class AnsweredRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A sampled request of a finished batch, and what became of it; `cut` if by its cap."""

    shape: str
    characters: int
    prompt_tokens: int
    completion_tokens: int
    cut: bool


class TokenHistory:
    """What finished batches of a model tell about the next one."""

    def __init__(self, answered: Sequence[AnsweredRequest] = ()) -> None:
        self._answers: dict[str, list[tuple[int, bool]]] = {}
        characters = tokens = 0
        for request in answered:
            answers = self._answers.setdefault(request.shape, [])
            answers.append((request.completion_tokens, request.cut))
            characters += request.characters
            tokens += request.prompt_tokens
        #: Learned of this model; None before the first batch.
        self.tokens_per_character = tokens / characters if characters and tokens else None

    def answers(self, shape: str) -> Sequence[tuple[int, bool]]:
        """Return lengths of answers of a shape, and whether each was cut; empty if too few."""
        known = self._answers.get(shape, ())
        return known if len(known) >= FEWEST_ANSWERS else ()


class Expectation(msgspec.Struct, frozen=True, kw_only=True):
    """What is expected of the requests of one shape, each of them.

    Attributes:
        requests: Of the batch.
        from_history: Whether the answers' length is that of earlier ones, and no prior.
    """

    requests: int
    prompt_tokens: float
    completion_tokens: float
    from_history: bool


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a batch is expected to take.

    Attributes:
        requests: Usable ones.
        seconds: Of answering them with the engine to themselves, from the first submission to the
            last answer; None while nobody has measured the engine.
        start_seconds: Until the engine is ready, if it is not running; None if not measured.
        ahead_seconds: Until what is before it in the queue is done.
        window_seconds: Of its completion window.
        from_history: Share of the requests whose answers' length is known from earlier ones.
        measurements: Of the engine's speed, on which the seconds rest.
        costs: For a look at the work that is left while it runs.
        price: Of the device for `seconds`; None if no price is set.
        engine: What measurements of the engine are kept by; empty if that is not known.
        at_a_time: Requests that it computes together at most.
        created_at: POSIX seconds.
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
    expectations: dict[str, Expectation] = {}
    price: Band | None = None
    engine: dict[str, str] = {}
    at_a_time: int = 1
    created_at: float = 0.0

    @property
    def tokens(self) -> int:
        """Expected in all, prompts and answers."""
        return round(self.prompt_tokens.mid + self.completion_tokens.mid)

    @property
    def until_done(self) -> Band | None:
        """Seconds from admission to the last answer: queue, start of the engine, work."""
        if self.seconds is None:
            return None
        return self.seconds.shifted(self.ahead_seconds + (self.start_seconds or 0.0))

    @property
    def cannot_meet_window(self) -> bool:
        """Whether even the optimistic end of the band is beyond the completion window."""
        done, window = self.until_done, self.window_seconds
        return done is not None and window is not None and done.low > window

    @property
    def may_miss_window(self) -> bool:
        """Whether it is more likely than not to end beyond its completion window."""
        done, window = self.until_done, self.window_seconds
        return done is not None and window is not None and done.mid > window


class _ShapeModel:
    """The requests of one shape, ready to be drawn from."""

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
        #: Scaled by bytes, which are known of all: long requests outside the sample count, too.
        self.prompt_tokens = tokens / size * totals.size_bytes

    def draw(self, dice: random.Random) -> tuple[float, float]:
        """Return tokens of all answers, and of the longest."""
        drawn = [self._answer(dice) for _ in range(min(self.requests, DRAWN_REQUESTS))]
        if not drawn:
            return 0.0, 0.0
        factor = math.exp(dice.gauss(0.0, self.spread))
        most = max(request.cap or math.inf for request in self._sample)
        mean = sum(min(tokens * factor, cap) for tokens, cap in drawn) / len(drawn)
        return mean * self.requests, min(max(tokens for tokens, _ in drawn) * factor, most)

    def _answer(self, dice: random.Random) -> tuple[float, float]:
        """Return the tokens of one answer, and the most that it could have."""
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
    """Return what a batch will take on an engine to itself.

    Args:
        profile: Of the batch.
        history: Of the model that answers.
        throughput: Of the engine, the device and its memory settings; None if never measured.
        at_a_time: Requests that are computed together.
        seed: Of the draws.
    """
    models = _models(profile, history)
    dice = random.Random(seed)
    prompt = sum(model.prompt_tokens for model in models.values())
    prompts, answers, seconds = [], [], []
    sums = dict.fromkeys(models, 0.0)
    for _ in range(DRAWS):
        drawn = {shape: model.draw(dice) for shape, model in models.items()}
        for shape, (tokens, _) in drawn.items():
            sums[shape] += tokens / DRAWS
        answers.append(sum(tokens for tokens, _ in drawn.values()))
        prompts.append(prompt * math.exp(dice.gauss(0.0, _prompt_spread(profile, history))))
        if throughput is not None:
            longest = max((longest for _, longest in drawn.values()), default=0.0)
            work = Work(
                requests=profile.requests,
                prompt_tokens=prompts[-1],
                completion_tokens=answers[-1],
                steps=steps(
                    requests=profile.requests,
                    completion_tokens=answers[-1],
                    longest=longest,
                    at_a_time=at_a_time,
                ),
            )
            factor = math.exp(dice.gauss(0.0, throughput.spread))
            seconds.append(throughput.costs.seconds(work) * factor)
    known = sum(model.requests for model in models.values() if model.from_history)
    return Estimate(
        requests=profile.requests,
        prompt_tokens=_band(prompts),
        completion_tokens=_band(answers),
        basis=_basis(profile, history),
        seconds=_band(seconds) if seconds else None,
        from_history=known / profile.requests if profile.requests else 0.0,
        measurements=0 if throughput is None else throughput.measurements,
        costs=None if throughput is None else throughput.costs,
        expectations=_expectations(models, sums),
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


def _expectations(
    models: Mapping[str, _ShapeModel], completion_tokens: Mapping[str, float]
) -> dict[str, Expectation]:
    return {
        shape: Expectation(
            requests=model.requests,
            prompt_tokens=round(model.prompt_tokens / model.requests, 2),
            completion_tokens=round(completion_tokens[shape] / model.requests, 2),
            from_history=model.from_history,
        )
        for shape, model in models.items()
    }


def _prompt_tokens(request: SampledRequest, history: TokenHistory) -> float:
    if request.prompt_tokens is not None:
        return request.prompt_tokens
    if history.tokens_per_character is not None:
        # What the template adds is in the ratio.
        return request.characters * history.tokens_per_character
    template = TEMPLATE_TOKENS if request.shape.startswith("chat") else 0
    return request.characters / CHARACTERS_PER_TOKEN + template


def _basis(profile: TokenProfile, history: TokenHistory) -> Basis:
    if profile.sample and all(r.prompt_tokens is not None for r in profile.sample):
        return Basis.TOKENIZER
    return Basis.CHARACTERS if history.tokens_per_character is None else Basis.LEARNED


def _prompt_spread(profile: TokenProfile, history: TokenHistory) -> float:
    match _basis(profile, history):
        case Basis.TOKENIZER:
            return TOKENIZED_SPREAD
        case Basis.LEARNED:
            return LEARNED_SPREAD
        case Basis.CHARACTERS:
            return GUESSED_SPREAD


def _band(draws: Sequence[float]) -> Band:
    ordered = sorted(draws)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return Band(low=at(0.1), mid=at(0.5), high=at(0.9))


def seconds_band(band: Band) -> str:
    """Return a band of seconds: `3 min 20 s (2 min 50 s to 4 min 5 s)`."""
    return f"{duration(band.mid)} ({duration(band.low)} to {duration(band.high)})"


def tokens_band(band: Band) -> str:
    """Return a band of tokens: `1,200 (900 to 1,800)`."""
    return f"{band.mid:,.0f} ({band.low:,.0f} to {band.high:,.0f})"


def estimate_rows(estimate: Estimate) -> list[tuple[str, str]]:
    """Return an estimate as names and texts, for a table; what is not known is said to be."""
    time = "not known: this engine was never measured; the job benchmark_engine does it"
    if estimate.seconds is not None:
        time = seconds_band(estimate.seconds)
        time += f", by {estimate.measurements:,} measurements"
    if estimate.start_seconds is not None:
        time += f"; engine start {duration(estimate.start_seconds)}"
    answers = f"{tokens_band(estimate.completion_tokens)}, {estimate.from_history:.0%} by history"
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
    """Return a sentence about a completion window that will hardly be met; None if it will."""
    done = estimate.until_done
    if done is None or estimate.window_seconds is None or not estimate.may_miss_window:
        return None
    verdict = "cannot" if estimate.cannot_meet_window else "may not"
    return (
        f"by the estimate it {verdict} end within its completion window of"
        f" {duration(estimate.window_seconds)}: {duration(done.low)} to {duration(done.high)},"
        f" {duration(estimate.ahead_seconds)} of them behind other batches"
    )
