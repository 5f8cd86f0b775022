"""Calibration: rounds that tell costs apart, and an engine that is measured by them."""

import asyncio

import msgspec
import pytest

from batch_orchestration.core.errors import CalibrationFailed
from batch_orchestration.core.outcomes import Completion, Outcome, Usage
from batch_orchestration.estimates.benchmark import CalibrationReport, calibrate, rounds
from batch_orchestration.estimates.costs import Source
from batch_orchestration_tests.support.builders import make_failure
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine


def answered(body: bytes, times: int) -> Outcome:
    asked = msgspec.json.decode(body)
    prompt = len(asked["messages"][0]["content"]) // 4
    usage = Usage(prompt_tokens=prompt, completion_tokens=asked["max_tokens"])
    return Completion(status=200, body=msgspec.Raw(b"{}"), usage=usage)


def calibration(engine: ScriptedEngine, **fields: float) -> CalibrationReport:
    values = {"requests": 16, "seconds": 60.0, "at_a_time": 8, **fields}
    return asyncio.run(calibrate(engine, run_id="r", **values))  # type: ignore[arg-type]


def test_rounds_differ_in_prompts_answers_and_requests_at_a_time() -> None:
    planned = rounds(requests=32, at_a_time=128, context_tokens=2048)

    assert len({r.prompt_tokens for r in planned}) == 2
    assert len({r.answer_tokens for r in planned}) == 2
    assert {r.at_a_time for r in planned} == {1, 8, 32}


def test_no_request_is_longer_than_the_context() -> None:
    planned = rounds(requests=32, at_a_time=128, context_tokens=256)

    # A byte-level tokenizer makes four tokens of what is one of English.
    assert all(4 * r.prompt_tokens + r.answer_tokens < 256 for r in planned)


def test_each_round_is_measured_and_marked_as_calibration() -> None:
    engine = ScriptedEngine(answered)

    report = calibration(engine)

    assert len(report.runs) == 8
    assert {run.source for run in report.runs} == {Source.CALIBRATION}
    assert report.runs[0].requests == 16
    assert report.runs[0].completion_tokens == 16 * 4
    assert report.throughput is not None
    assert report.failed == 0
    assert engine.most_in_flight == 8


def test_no_two_prompts_begin_alike() -> None:
    engine = ScriptedEngine(answered)

    calibration(engine)

    beginnings = [
        msgspec.json.decode(body)["messages"][0]["content"][:12] for body in engine.submissions
    ]
    assert len(set(beginnings)) == len(beginnings)


def test_after_its_time_no_further_round_is_begun() -> None:
    assert len(calibration(ScriptedEngine(answered), seconds=1e-9).runs) == 1


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
    assert report.runs[0].requests == 15
