"""Builders of estimates and measurements."""

from typing import Any

from batch_orchestration.estimates.costs import Costs, Measurement, Source, Throughput
from batch_orchestration.estimates.estimate import Band, Basis, Estimate
from batch_orchestration_tests.support.builders import NOW

#: Key under which the measurements of `make_measurement` are stored.
ENGINE = {"engine": "vllm", "model": "m", "device": "cpu"}


def make_band(mid: float) -> Band:
    """A band from half to twice its middle."""
    return Band(low=mid / 2, mid=mid, high=mid * 2)


def make_costs(**costs: float) -> Costs:
    """Costs of which those not given are zero."""
    none = {"request": 0.0, "prompt_token": 0.0, "completion_token": 0.0, "step": 0.0}
    return Costs(**{**none, **costs})


def make_throughput(*, spread: float = 0.1, **costs: float) -> Throughput:
    """A fitted throughput."""
    return Throughput(costs=make_costs(**costs), spread=spread, measurements=9, fitted=True)


def make_estimate(**fields: Any) -> Estimate:
    """An estimate of ten requests: 100 tokens of prompts, 50 of answers, 100 seconds."""
    values: dict[str, Any] = {
        "requests": 10,
        "prompt_tokens": make_band(100),
        "completion_tokens": make_band(50),
        "basis": Basis.TOKENIZER,
        "seconds": make_band(100),
        "engine": ENGINE,
        "created_at": NOW,
    }
    return Estimate(**{**values, **fields})


def make_measurement(**fields: Any) -> Measurement:
    """Two seconds of a calibration: four answers of 120 tokens, prompts included."""
    values: dict[str, Any] = {
        **ENGINE,
        "memory_level": "as configured",
        "measured_at": NOW,
        "source": Source.CALIBRATION,
        "run_id": "r",
        "requests": 4,
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "longest": 8,
        "at_a_time": 2,
        "seconds": 2.0,
    }
    return Measurement(**{**values, **fields})
