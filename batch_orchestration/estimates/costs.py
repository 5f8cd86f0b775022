"""Engine speed: the costs of requests and tokens, fitted to measurements."""

import math
from collections.abc import Sequence
from enum import StrEnum

import msgspec

#: Prior standard deviation of log(time taken / time predicted), for fitted and for guessed costs.
SPREAD_FITTED, SPREAD_GUESSED = 0.20, 0.45
#: Weight of that prior, as a number of measurements.
SPREAD_WEIGHT = 3.0
#: Four costs cannot be separated with fewer measurements.
FEWEST_MEASUREMENTS = 4
_SWEEPS = 2000


class Source(StrEnum):
    """The origin of a measurement."""

    #: The job `benchmark_engine`: made-up prompts.
    CALIBRATION = "calibration"
    #: A run of a batch.
    HISTORY = "history"


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """Work of an engine, planned or done.

    Attributes:
        steps: Engine steps, each of which adds a token to every running sequence. `work_alone` and
            `work_shared` count them.
    """

    requests: float
    prompt_tokens: float
    completion_tokens: float
    steps: float


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds per unit of work on a busy engine."""

    request: float
    prompt_token: float
    completion_token: float
    step: float

    def seconds(self, work: Work) -> float:
        """Return the seconds that the work takes."""
        return (
            self.request * work.requests
            + self.prompt_token * work.prompt_tokens
            + self.completion_token * work.completion_tokens
            + self.step * work.steps
        )

    def scaled(self, factor: float) -> "Costs":
        """Return the costs of an engine that takes `factor` times as long."""
        return Costs(**{name: cost * factor for name, cost in msgspec.structs.asdict(self).items()})


#: Ratios for an engine without enough measurements: reading a token is ten times cheaper than
#: writing one.
GUESSED = Costs(request=2.0, prompt_token=0.1, completion_token=1.0, step=1.0)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Work of an engine in one run of a batch, or in one round of a calibration.

    Attributes:
        engine: Kind of the engine that answered.
        memory_level: Memory level in force, in words; empty if memory is not ours to set.
        longest: Tokens of the longest answer.
        at_a_time: Most requests that the engine had at a time.
        seconds: Time during which the engine had at least one request.
    """

    engine: str
    model: str
    device: str
    memory_level: str
    measured_at: float
    source: Source
    batch_id: str | None = None
    run_id: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    longest: int
    at_a_time: int
    seconds: float

    @property
    def work(self) -> Work:
        """The work that was done in these seconds."""
        return work_alone(
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            longest=self.longest,
            at_a_time=self.at_a_time,
        )


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """The speed of an engine, and its uncertainty.

    Attributes:
        spread: Standard deviation of log(time taken / time predicted).
        measurements: Number of measurements used.
        fitted: Whether each cost was fitted; False if the guessed costs were only scaled.
    """

    costs: Costs
    spread: float
    measurements: int
    fitted: bool


def work_alone(
    *,
    requests: float,
    prompt_tokens: float,
    completion_tokens: float,
    longest: float,
    at_a_time: int,
) -> Work:
    """Return the work of requests that have the engine to themselves, `at_a_time` of them at once.

    Its steps are max(tokens of the longest answer, tokens of all answers / sequences at a time).
    """
    return Work(
        requests=requests,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        steps=max(longest, completion_tokens / max(1.0, min(requests, at_a_time))),
    )


def work_shared(
    *, requests: float, prompt_tokens: float, completion_tokens: float, at_a_time: float
) -> Work:
    """Return the work of requests among others: each step is shared by `at_a_time` sequences."""
    return Work(
        requests=requests,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        steps=completion_tokens / max(1.0, at_a_time),
    )


def throughput(measurements: Sequence[Measurement]) -> Throughput | None:
    """Return the speed that follows from the measurements; None without a usable one."""
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
    # Rounds of one calibration agree more with each other than with another day, so only batches
    # reduce the uncertainty.
    weight = SPREAD_WEIGHT + len(history)
    spread = math.sqrt((SPREAD_WEIGHT * prior**2 + squares) / weight)
    return Throughput(
        costs=costs.scaled(math.exp(centre)),
        spread=spread,
        measurements=len(usable),
        fitted=fitted,
    )


def _fit(measurements: Sequence[Measurement]) -> Costs:
    """Return the non-negative costs with the least squares of relative errors.

    The fit is a coordinate descent: each cost in turn is set to its best value given the others.
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
