"""`kill -9` around the decision to pause a batch: it stands, and nothing is asked after it."""

import signal
from functools import partial
from pathlib import Path

import pytest

from batch_orchestration.core.crash_points import CrashPoint
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine, refusing
from batch_orchestration_tests.support.workbench import Workbench


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path, policy={"max_failure_rate": 0.5})


def test_a_run_killed_after_the_decision_leaves_the_batch_paused(bench: Workbench) -> None:
    plan = bench.admit_now(200)

    died = bench.kill("run", plan, partial(refusing, "question"), at=f"{CrashPoint.AFTER_HALT}:1")
    engine = ScriptedEngine()
    bench.run(plan, engine, run_id="run-2")

    assert died == -signal.SIGKILL
    assert engine.starts == 0
    assert bench.halt(plan) is not None
    assert bench.dispatch().needed == ()
    bench.resume(plan, max_failure_rate=1.0)
    bench.run(plan, ScriptedEngine(), run_id="run-3")
    bench.deliver(plan)
    assert bench.status(plan) == "completed"
    outcomes = bench.lines(plan, "output.jsonl") + bench.lines(plan, "errors.jsonl")
    assert len({line["custom_id"] for line in outcomes}) == len(outcomes) == 200


def test_runs_killed_again_and_again_before_it_burn_no_more_than_one(bench: Workbench) -> None:
    plan = bench.admit_now(200)

    for _ in range(5):
        bench.kill("run", plan, partial(refusing, "question"), at=f"{CrashPoint.AFTER_OUTCOME}:6")
    bench.run(plan, refusing("question"))

    assert bench.halt(plan) is not None
    assert len(bench.settled(plan)) < 50


def test_a_resumption_killed_after_its_decision_has_ended_the_pause(bench: Workbench) -> None:
    plan = bench.admit_now(200)
    bench.run(plan, refusing("question"))

    died = bench.kill("resume", plan, at=f"{CrashPoint.AFTER_RESUMPTION}:1")

    assert died == -signal.SIGKILL
    assert bench.folder.halt(plan.batch_id).path.exists()
    assert bench.halt(plan) is None
    assert bench.dispatch().needed
