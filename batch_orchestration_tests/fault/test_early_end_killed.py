"""`kill -9` at every step of an early end and of a resumption: the next process does the rest."""

import signal

import pytest

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.crash_points import CrashPoint
from batch_orchestration.lifecycle.resumption import finish_resumptions
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench

#: The end, the step that is killed, where, and the status that the store has then.
STEPS = [
    ("cancelled", "cancel", CrashPoint.AFTER_EARLY_END, 1, "in_progress"),
    ("cancelled", "deliver", CrashPoint.BEFORE_CLOSE_OUT, 1, "cancelling"),
    ("cancelled", "deliver", CrashPoint.BEFORE_CLOSE_OUT, 2, "cancelling"),
    ("cancelled", "deliver", CrashPoint.BEFORE_OUTPUT_RENAME, 1, "cancelling"),
    ("cancelled", "deliver", CrashPoint.AFTER_RENAMES, 1, "cancelling"),
    ("expired", "end_overdue", CrashPoint.AFTER_EARLY_END, 1, "in_progress"),
    ("expired", "deliver", CrashPoint.BEFORE_CLOSE_OUT, 1, "in_progress"),
]


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


@pytest.fixture
def plan(bench) -> BatchPlan:
    """A batch of four chunks, of which the first is committed."""
    plan = bench.admit_now(40)
    bench.run(plan, ScriptedEngine(), numbers=[0])
    return plan


@pytest.mark.parametrize(("end", "step", "point", "passing", "status"), STEPS)
def test_an_early_end_killed_anywhere_is_completed(bench, plan, end, step, point, passing, status):
    if end == "expired":
        bench.let_expire(plan)
    if step == "deliver":
        _ = bench.cancel(plan) if end == "cancelled" else bench.end_overdue()

    died = bench.kill(step, *([] if step == "end_overdue" else [plan]), at=f"{point}:{passing}")
    status_at_death = bench.status(plan)
    bench.end_overdue()
    bench.deliver(plan)

    assert died == -signal.SIGKILL
    assert status_at_death == status
    actor = "tester" if end == "cancelled" else "sensor"
    assert bench.folder.early_end(plan.batch_id).read().actor == actor
    assert bench.numbers(plan, "output.jsonl") == [*range(10)]
    assert bench.numbers(plan, "errors.jsonl") == [*range(10, 40)]
    codes = {line["error"]["code"] for line in bench.lines(plan, "errors.jsonl")}
    assert codes == {f"batch_{end}"}
    statuses = [str(event.to_status) for event in bench.store.batch_events(plan.batch_id)]
    assert statuses[-1] == bench.status(plan) == end
    assert len(statuses) == len(set(statuses)) == 4


@pytest.mark.parametrize("point", [CrashPoint.AFTER_RESUMPTION, CrashPoint.AFTER_REOPENING])
def test_a_resumption_killed_anywhere_is_completed(bench, plan, point):
    bench.cancel(plan)
    bench.deliver(plan)

    died = bench.kill("resume", plan, at=f"{point}:1")
    status_at_death = bench.status(plan)
    finished = finish_resumptions(folder=bench.folder, store=bench.store)
    bench.finish(plan)

    assert died == -signal.SIGKILL
    assert status_at_death == "cancelled"
    assert finished == [plan.batch_id]
    assert bench.status(plan) == "completed"
    assert len(bench.lines(plan, "output.jsonl")) == 40
