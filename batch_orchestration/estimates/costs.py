"""How fast an engine works: what requests and tokens cost it, fitted to what was measured."""

import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec

#: What a measurement says about the next one: without many of them, the logarithm of the ratio
#: between time taken and time predicted has about this standard deviation ...
SPREAD_FITTED, SPREAD_GUESSED = 0.20, 0.45
#: ... which counts as much as so many measurements.
SPREAD_WEIGHT = 3.0
#: Four costs cannot be told from fewer measurements.
FEWEST_MEASUREMENTS = 4
_SWEEPS = 2000


class Source(StrEnum):
    """Where a measurement comes from."""

    #: The job `benchmark_engine`: made-up prompts.
    CALIBRATION = "calibration"
    #: A run of a batch.
    HISTORY = "history"


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine has to do, or did.

    Attributes:
        steps: How often it computes all sequences that it has: no fewer than the longest answer
            has tokens, and than all answers have by the sequences at a time.
    """

    requests: float
    prompt_tokens: float
    completion_tokens: float
    steps: float


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that each unit of work takes on an engine kept busy."""

    request: float
    prompt_token: float
    completion_token: float
    step: float

    def seconds(self, work: Work) -> float:
        """Return how long the work takes."""
        return (
            self.request * work.requests
            + self.prompt_token * work.prompt_tokens
            + self.completion_token * work.completion_tokens
            + self.step * work.steps
        )

    def scaled(self, factor: float) -> "Costs":
        """Return the costs of an engine that takes `factor` times as long."""
        return Costs(**{name: cost * factor for name, cost in msgspec.structs.asdict(self).items()})


#: Ratios where nothing better is known: to read a token is ten times cheaper than to write one.
GUESSED = Costs(request=2.0, prompt_token=0.1, completion_token=1.0, step=1.0)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Work that was done in so many seconds."""

    work: Work
    seconds: float
    source: Source


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """How fast an engine is, and how sure that is.

    Attributes:
        spread: Standard deviation of the logarithm of time taken by time predicted.
        measurements: How many it rests on.
        fitted: Whether the costs were told apart, not only scaled.
    """

    costs: Costs
    spread: float
    measurements: int
    fitted: bool


def steps(*, requests: float, completion_tokens: float, longest: float, at_a_time: int) -> float:
    """Return how many steps answers take that are computed so many at a time."""
    return max(longest, completion_tokens / max(1.0, min(requests, at_a_time)))


def throughput(measurements: Sequence[Measurement]) -> Throughput | None:
    """Return what the measurements say; None if there is none."""
    usable = [m for m in measurements if m.seconds > 0 and m.work.requests > 0]
    if not usable:
        return None
    fitted = len(usable) >= FEWEST_MEASUREMENTS
    costs = _fit(usable) if fitted else GUESSED
    history = [m for m in usable if m.source is Source.HISTORY]
    factors = [math.log(m.seconds / max(1e-9, costs.seconds(m.work))) for m in history or usable]
    centre = sum(factors) / (len(factors) + (1 if fitted else 0))
    prior = SPREAD_FITTED if fitted else SPREAD_GUESSED
    squares = sum((factor - centre) ** 2 for factor in factors)
    # Rounds of one calibration agree with each other more than with another day: only batches
    # make the next one surer.
    weight = SPREAD_WEIGHT + len(history)
    spread = math.sqrt((SPREAD_WEIGHT * prior**2 + squares) / weight)
    return Throughput(
        costs=costs.scaled(math.exp(centre)),
        spread=spread,
        measurements=len(usable),
        fitted=fitted,
    )


def _fit(measurements: Sequence[Measurement]) -> Costs:
    """Return the costs, none of them negative, with the least squares of relative errors.

    By coordinate descent: each cost in turn is set to its best value given the others.
    """
    rows = [[value / m.seconds for value in _features(m.work)] for m in measurements]
    scales = [max(row[column] for row in rows) or 1.0 for column in range(4)]
    rows = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    weights = [0.0] * 4
    residuals = [1.0] * len(rows)
    norms = [sum(row[column] ** 2 for row in rows) for column in range(4)]
    for _ in range(_SWEEPS):
        for column in range(4):
            if not norms[column]:
                continue
            pull = sum(row[column] * rest for row, rest in zip(rows, residuals, strict=True))
            better = max(0.0, weights[column] + pull / norms[column])
            change, weights[column] = better - weights[column], better
            residuals = [
                rest - change * row[column] for row, rest in zip(rows, residuals, strict=True)
            ]
    request, prompt, completion, step = (
        weight / scale for weight, scale in zip(weights, scales, strict=True)
    )
    return Costs(request=request, prompt_token=prompt, completion_token=completion, step=step)


def _features(work: Work) -> tuple[float, float, float, float]:
    return work.requests, work.prompt_tokens, work.completion_tokens, work.steps
