"""`kill -9` at every step of an early end: whoever comes next does what is left."""

import signal
from pathlib import Path

import pytest

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.crash_points import CrashPoint
from batch_orchestration.lifecycle.resumption import finish_resumptions
from batch_orchestration_tests.fault.crashing_early_end import take_step
from batch_orchestration_tests.support.closing_bench import ClosingBench
from batch_orchestration_tests.support.forks import run_forked
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine

#: The step, where it is killed, and the status that the store has then.
STEPS = [
    ("cancel", CrashPoint.AFTER_EARLY_END, 1, "in_progress"),
    ("deliver", CrashPoint.BEFORE_CLOSE_OUT, 1, "cancelling"),
    ("deliver", CrashPoint.BEFORE_CLOSE_OUT, 2, "cancelling"),
    ("deliver", CrashPoint.BEFORE_OUTPUT_RENAME, 1, "cancelling"),
    ("deliver", CrashPoint.AFTER_RENAMES, 1, "cancelling"),
]


def half_done(root: Path) -> tuple[ClosingBench, BatchPlan]:
    """The first of four chunks is committed."""
    bench = ClosingBench(root)
    plan = bench.admit_now(40)
    bench.run(plan, ScriptedEngine(), numbers=[0])
    return bench, plan


def assert_delivered(bench: ClosingBench, plan: BatchPlan, status: str) -> None:
    assert bench.status(plan) == status
    output, errors = (bench.lines(plan, f"{name}.jsonl") for name in ("output", "errors"))
    assert [line["custom_id"] for line in output] == [f"request-{n}" for n in range(10)]
    assert [line["custom_id"] for line in errors] == [f"request-{n}" for n in range(10, 40)]
    assert {line["error"]["code"] for line in errors} == {f"batch_{status}"}
    statuses = [str(event.to_status) for event in bench.store.batch_events(plan.batch_id)]
    assert statuses[-1] == status
    assert len(statuses) == len(set(statuses)) == 4


@pytest.mark.parametrize(("step", "point", "passing", "status"), STEPS)
def test_a_cancellation_killed_anywhere_is_carried_through(
    tmp_path: Path, step: str, point: CrashPoint, passing: int, status: str
) -> None:
    bench, plan = half_done(tmp_path)
    if step == "deliver":
        bench.cancel(plan)

    died = run_forked(take_step, tmp_path, step, crash_point=f"{point}:{passing}")
    status_at_death = bench.status(plan)
    bench.look()
    bench.deliver(plan)

    assert died == -signal.SIGKILL
    assert status_at_death == status
    assert bench.folder.early_end(plan.batch_id).read().actor == "tester"
    assert_delivered(bench, plan, "cancelled")


@pytest.mark.parametrize(
    ("step", "point"),
    [("look", CrashPoint.AFTER_EARLY_END), ("deliver", CrashPoint.BEFORE_CLOSE_OUT)],
)
def test_an_expiry_killed_anywhere_is_carried_through(
    tmp_path: Path, step: str, point: CrashPoint
) -> None:
    bench, plan = half_done(tmp_path)
    bench.let_expire(plan)
    if step == "deliver":
        bench.look()

    died = run_forked(take_step, tmp_path, step, crash_point=f"{point}:1")
    bench.look()
    bench.deliver(plan)

    assert died == -signal.SIGKILL
    assert_delivered(bench, plan, "expired")


@pytest.mark.parametrize("point", [CrashPoint.AFTER_RESUMPTION, CrashPoint.AFTER_REOPENING])
def test_a_resumption_killed_anywhere_is_carried_through(tmp_path: Path, point: CrashPoint) -> None:
    bench, plan = half_done(tmp_path)
    bench.cancel(plan)
    bench.deliver(plan)

    died = run_forked(take_step, tmp_path, "resume", crash_point=f"{point}:1")
    status_at_death = bench.status(plan)
    finished = finish_resumptions(folder=bench.folder, store=bench.store)
    bench.finish(plan)

    assert died == -signal.SIGKILL
    assert status_at_death == "cancelled"
    assert finished == [plan.batch_id]
    assert bench.status(plan) == "completed"
    assert len(bench.lines(plan, "output.jsonl")) == 40
