"""An engine that dies whatever it is asked convicts nobody."""

import contextlib
import random
import re
from pathlib import Path

import pytest

from batch_orchestration.core.errors import EngineDied, EngineKeepsDying, Exhaustion, MemoryShortage
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench


def number_in(body: bytes) -> int | None:
    """Of the question; None for a one-token probe."""
    found = re.search(rb"question (\d+)", body)
    return int(found[1]) if found else None


def convicted(bench: Workbench, plan) -> dict[int, str]:
    return {
        settled.index: settled.outcome.code
        for settled in bench.store.settled(plan.batch_id)
        if isinstance(settled.outcome, Failure)
    }


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


@pytest.mark.parametrize("window", [1, 8, 64])
def test_an_engine_that_dies_of_everything_convicts_nobody_and_is_started_three_times(
    bench: Workbench, window: int
) -> None:
    plan = bench.admitted(200, requests_per_chunk=100)
    for run in range(3):
        engine = ScriptedEngine(lambda body, times: EngineDied("sick"))
        with pytest.raises(EngineKeepsDying, match="no request is to blame"):
            bench.run(plan, engine, in_flight=window, engine_restarts=30, run_id=f"sick-{run}")
        assert engine.starts <= 3

    bench.run(plan, ScriptedEngine(), in_flight=window, run_id="well")
    assert convicted(bench, plan) == {}
    assert bench.indices(plan) == list(range(200))


@pytest.mark.parametrize(("window", "restarts"), [(1, 0), (8, 0), (8, 1), (32, 30)])
def test_an_engine_that_falls_sick_in_mid_run_convicts_nobody(
    bench: Workbench, window: int, restarts: int
) -> None:
    plan = bench.admitted(200, requests_per_chunk=100)
    asked: list[bytes] = []

    def script(body: bytes, times: int):
        asked.append(body)
        return EngineDied("sick") if len(asked) > 60 else None

    engine = ScriptedEngine(script)
    for run in range(8):
        with pytest.raises((EngineKeepsDying, EngineDied)):
            bench.run(
                plan, engine, in_flight=window, engine_restarts=restarts, run_id=f"sick-{run}"
            )

    bench.run(plan, ScriptedEngine(), in_flight=window, run_id="well")
    assert convicted(bench, plan) == {}
    assert bench.indices(plan) == list(range(200))


def test_an_engine_that_answers_one_request_in_each_life_convicts_nobody(bench: Workbench) -> None:
    plan = bench.admitted(60)
    lives: dict[int, int] = {}

    def script(body: bytes, times: int):
        lives[engine.starts] = lives.get(engine.starts, 0) + 1
        return EngineDied("worn out") if lives[engine.starts] > 1 else None

    engine = ScriptedEngine(script)
    bench.run(plan, engine, in_flight=8, engine_restarts=500)

    assert convicted(bench, plan) == {}
    assert bench.indices(plan) == list(range(60))


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_that_dies_at_random_convicts_hardly_anyone(bench: Workbench, seed: int) -> None:
    plan = bench.admitted(200, requests_per_chunk=100)
    dice = random.Random(seed)

    def script(body: bytes, times: int):
        return EngineDied("by chance") if dice.random() < 0.1 else None

    for run in range(20):
        # By chance it dies four times in a row; whoever is asked then lets the run go on.
        with contextlib.suppress(EngineKeepsDying):
            bench.run(
                plan,
                ScriptedEngine(script),
                in_flight=8,
                engine_restarts=10_000,
                run_id=f"run-{run}",
            )
            break

    assert len(convicted(bench, plan)) <= 1
    assert bench.indices(plan) == list(range(200))


@pytest.mark.parametrize("guilty", [(0,), (500,), (3, 501, 502), tuple(range(0, 1000, 125))])
def test_each_conviction_costs_at_most_one_control(
    bench: Workbench, guilty: tuple[int, ...]
) -> None:
    plan = bench.admitted(1000, requests_per_chunk=100)

    def script(body: bytes, times: int):
        return EngineDied("killed") if number_in(body) in guilty else None

    engine = ScriptedEngine(script)
    bench.run(plan, engine, in_flight=64, engine_restarts=100)

    assert convicted(bench, plan) == dict.fromkeys(guilty, FailureCode.ENGINE_KILLED)
    assert bench.indices(plan) == list(range(1000))
    assert engine.starts - 1 <= len(guilty) * (6 + 1) + 1
    probes = sum(times for body, times in engine.submissions.items() if number_in(body) is None)
    assert probes <= len(guilty)


def test_a_killer_that_is_all_there_is_to_ask_is_found_with_the_help_of_a_probe(
    bench: Workbench,
) -> None:
    plan = bench.admitted(1)

    def script(body: bytes, times: int):
        return None if number_in(body) is None else EngineDied("killed")

    engine = ScriptedEngine(script)
    bench.run(plan, engine, engine_restarts=5)

    assert convicted(bench, plan) == {0: FailureCode.ENGINE_KILLED}
    assert engine.starts <= 3


def test_want_of_memory_on_the_lowest_level_is_confirmed_before_it_convicts(
    bench: Workbench,
) -> None:
    """A log that tells of exhausted memory, perhaps of another time, is not believed at once."""
    plan = bench.admitted(40)
    exhausted = Exhaustion(shortage=MemoryShortage.WORK, evidence="CUDA out of memory")

    def script(body: bytes, times: int):
        if number_in(body) == 7 and times == 0:
            return EngineDied("killed by a person", exhaustion=exhausted)
        return None

    bench.run(plan, ScriptedEngine(script), in_flight=1, engine_restarts=5)

    assert convicted(bench, plan) == {}
    assert bench.indices(plan) == list(range(40))
