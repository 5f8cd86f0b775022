"""Calibration: rounds that separate the costs, and an engine measured by them."""

import asyncio
from typing import Any

import msgspec
import pytest

from batch_orchestration.core.errors import CalibrationFailed
from batch_orchestration.core.outcomes import Completion, Outcome, Usage
from batch_orchestration.estimates.benchmark import CalibrationReport, calibrate, rounds
from batch_orchestration.estimates.costs import Source
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration_tests.support.builders import make_failure
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine


def answered(body: bytes, times: int) -> Outcome:
    asked = msgspec.json.decode(body)
    prompt = len(asked["messages"][0]["content"]) // 4
    usage = Usage(prompt_tokens=prompt, completion_tokens=asked["max_tokens"])
    return Completion(status=200, body=msgspec.Raw(b"{}"), usage=usage)


def calibration(engine: ScriptedEngine, **fields: float) -> CalibrationReport:
    values: dict[str, Any] = {"requests": 16, "seconds": 60.0, **fields}
    return asyncio.run(calibrate(engine, EngineInForce(at_a_time=8), run_id="r", **values))


def test_rounds_differ_in_prompts_answers_and_concurrency_and_fit_the_context() -> None:
    planned = rounds(requests=32, at_a_time=128, context_tokens=2048)
    small = rounds(requests=32, at_a_time=128, context_tokens=256)

    assert len({r.prompt_tokens for r in planned}) == 2
    assert len({r.answer_tokens for r in planned}) == 2
    assert {r.at_a_time for r in planned} == {1, 8, 32}
    # A byte-level tokenizer makes four tokens of one token of English.
    assert all(4 * r.prompt_tokens + r.answer_tokens < 256 for r in small)


def test_each_round_is_measured_and_no_two_prompts_begin_alike() -> None:
    engine = ScriptedEngine(answered)

    report = calibration(engine)

    beginnings = [
        msgspec.json.decode(body)["messages"][0]["content"][:12] for body in engine.submissions
    ]
    assert len(set(beginnings)) == len(beginnings)
    assert len(report.rounds) == 8
    assert {run.source for run in report.rounds} == {Source.CALIBRATION}
    assert report.rounds[0].requests == 16
    assert report.rounds[0].completion_tokens == 16 * 4
    assert report.throughput is not None
    assert report.failed == 0
    assert engine.most_in_flight == 8


def test_no_round_begins_after_the_time_limit() -> None:
    assert len(calibration(ScriptedEngine(answered), seconds=1e-9).rounds) == 1


def test_an_engine_that_answers_nothing_cannot_be_measured() -> None:
    with pytest.raises(CalibrationFailed, match="the engine said no"):
        calibration(ScriptedEngine(lambda body, times: make_failure()))


def test_failed_requests_are_counted_and_not_measured() -> None:
    def script(body: bytes, times: int) -> Outcome:
        asked = msgspec.json.decode(body)
        alone = asked["messages"][0]["content"].startswith("2 ")
        return make_failure() if alone else answered(body, times)

    report = calibration(ScriptedEngine(script))

    assert report.failed == 1
    assert report.rounds[0].requests == 15
