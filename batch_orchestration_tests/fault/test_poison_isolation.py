"""Requests that kill the engine, found by an engine in the test's process that dies on cue."""

import re
from math import ceil, log2
from pathlib import Path

import pytest

from batch_orchestration.core.errors import EngineDied, EngineSick
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode
from batch_orchestration.inference.faults.retries import BreakerPolicy
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench


def poisoned(*indices: int):
    """A script: the engine dies whenever it has one of these requests."""

    def script(body: bytes, submitted: int):
        number = int(re.search(rb"question (\d+)", body)[1])
        return EngineDied(f"scripted, by {number}") if number in indices else None

    return script


def convicted(bench: Workbench, plan) -> dict[int, str]:
    return {
        settled.index: settled.outcome.code
        for settled in bench.store.settled(plan.batch_id)
        if isinstance(settled.outcome, Failure)
    }


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def test_the_search_goes_on_where_the_last_run_stopped(bench: Workbench) -> None:
    """Suspects are in the journal: a run that may not restart again costs no knowledge."""
    plan = bench.admitted(200, requests_per_chunk=50)
    starts = 0
    for number in range(20):
        engine = ScriptedEngine(poisoned(77))
        try:
            bench.run(plan, engine, in_flight=32, engine_restarts=0, run_id=f"run-{number}")
        except EngineDied:
            starts += engine.starts
        else:
            break

    assert convicted(bench, plan) == {77: FailureCode.ENGINE_KILLED}
    assert bench.indices(plan) == list(range(200))
    assert starts <= ceil(log2(32)) + 2


def test_fresh_requests_are_answered_before_the_search_is_over(bench: Workbench) -> None:
    plan = bench.admitted(400, requests_per_chunk=400)
    order: list[int] = []

    def script(body: bytes, submitted: int):
        number = int(re.search(rb"question (\d+)", body)[1])
        order.append(number)
        return EngineDied("scripted") if number == 5 else None

    bench.run(plan, ScriptedEngine(script), in_flight=16, engine_restarts=20)

    last_test = len(order) - 1 - order[::-1].index(5)
    assert set(range(16, 20)) & set(order[:last_test])
    assert bench.indices(plan) == list(range(400))


def test_suspects_never_share_a_window_with_fresh_requests(bench: Workbench) -> None:
    plan = bench.admitted(300, requests_per_chunk=100)
    lives: list[set[int]] = [set()]

    def script(body: bytes, submitted: int):
        number = int(re.search(rb"question (\d+)", body)[1])
        if number == 40:
            lives.append(set())
            return EngineDied("scripted")
        lives[-1].add(number)
        return None

    bench.run(plan, ScriptedEngine(script), in_flight=16, engine_restarts=20)

    settled = {s.index: s for s in bench.store.settled(plan.batch_id)}
    assert settled[40].outcome.code == FailureCode.ENGINE_KILLED
    innocents = [index for index in settled if index != 40]
    assert all(isinstance(settled[index].outcome, Completion) for index in innocents)
    #: A fresh request shared a window with the guilty one once at the most: in the first death.
    assert all(settled[index].attempts <= 2 + ceil(log2(16)) for index in innocents)
    assert all(settled[index].attempts == 1 for index in range(80, 300))


def test_an_engine_killed_by_a_person_costs_no_request_an_attempt(bench: Workbench) -> None:
    plan = bench.admitted(100, requests_per_chunk=25)
    killed = []

    def script(body: bytes, submitted: int):
        if b"question 50" in body and not killed:
            killed.append(True)
            return EngineDied("killed by a person")
        return None

    bench.run(plan, ScriptedEngine(script))

    assert convicted(bench, plan) == {}
    assert bench.indices(plan) == list(range(100))


def test_a_sick_engine_does_not_burn_the_attempts_of_every_request(bench: Workbench) -> None:
    plan = bench.admitted(500, requests_per_chunk=250)

    def script(body: bytes, submitted: int):
        return Failure(code=FailureCode.ENGINE_ERROR, message="sick", status=500)

    sick = ScriptedEngine(script)
    breaker = BreakerPolicy(last=20, pause_seconds=0.01, max_pause_seconds=0.02, probes=3)

    with pytest.raises(EngineSick, match="3 probes"):
        bench.run(plan, sick, breaker=breaker)

    assert sick.submissions.total() < 60
    bench.run(plan, ScriptedEngine(), run_id="run-2")
    assert bench.indices(plan) == list(range(500))
    assert len(convicted(bench, plan)) < 20


def test_an_engine_that_dies_of_its_probe_is_not_waited_for_for_ever(bench: Workbench) -> None:
    plan = bench.admitted(100, requests_per_chunk=25)
    submissions = []

    def script(body: bytes, submitted: int):
        submissions.append(body)
        if len(submissions) <= 20:
            return Failure(code=FailureCode.ENGINE_ERROR, message="sick", status=500)
        return EngineDied("scripted") if len(submissions) == 21 else None

    breaker = BreakerPolicy(last=20, pause_seconds=0.01, max_pause_seconds=0.02, probes=3)

    bench.run(plan, ScriptedEngine(script), breaker=breaker, in_flight=10)

    assert bench.indices(plan) == list(range(100))
    assert convicted(bench, plan) == {}


def test_a_suspect_that_stood_alone_when_somebody_killed_the_engine_is_not_convicted(
    bench: Workbench,
) -> None:
    plan = bench.admitted(40)
    alone = []

    def script(body: bytes, submitted: int):
        """Somebody who kills the engine as long as it takes until request 7 stood alone once."""
        if b"question 7" not in body or len(alone) > 1:
            return None
        if engine.in_flight == 1:
            alone.append(submitted)
        return EngineDied("by hand") if len(alone) < 2 else None

    engine = ScriptedEngine(script)

    bench.run(plan, engine, in_flight=8, engine_restarts=10)

    assert len(alone) == 2
    assert convicted(bench, plan) == {}
    assert bench.indices(plan) == list(range(40))
