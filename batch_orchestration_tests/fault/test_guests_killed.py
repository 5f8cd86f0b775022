"""`kill -9` of a run while it serves a guest: neither batch loses a request or gets one twice."""

import json
import signal
from pathlib import Path

import pytest

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.crash_points import CrashPoint
from batch_orchestration_tests.fault.crashing_batch import run_batch
from batch_orchestration_tests.fault.mixed_batches import assert_accounted, durable_outcomes
from batch_orchestration_tests.support.forks import run_forked
from batch_orchestration_tests.support.workbench import Workbench, queued

#: The point, and at which passing the accident happens: while the guest is served, and with its
#: first and the host's own commit.
MOMENTS = [
    (CrashPoint.BEFORE_SUBMIT, 30),
    (CrashPoint.AFTER_SUBMIT, 30),
    (CrashPoint.BEFORE_OUTCOME, 30),
    (CrashPoint.AFTER_OUTCOME, 30),
    (CrashPoint.BEFORE_COMMIT, 1),
    (CrashPoint.AFTER_COMMIT, 1),
    (CrashPoint.AFTER_COMMIT, 4),
]


def run(bench: Workbench, run_id: str, plan: BatchPlan, *, crash_point: str | None = None) -> int:
    arguments = (bench.folder.root, run_id, "worker", plan.batch_id)
    return run_forked(run_batch, *arguments, crash_point=crash_point)


@pytest.mark.parametrize(("point", "passing"), MOMENTS)
def test_a_host_killed_anywhere_costs_neither_its_own_batch_nor_the_guest_a_request(
    tmp_path: Path, point: CrashPoint, passing: int
) -> None:
    bench = Workbench(tmp_path)
    big, urgent = (bench.admitted(60, name, requests_per_chunk=15) for name in ("big", "urgent"))
    (bench.folder.root / "simulated.json").write_text(json.dumps({"latency_seconds": 0.2}))
    bench.queue(queued(urgent, effective=10), queued(big))

    died = run(bench, "host", big, crash_point=f"{point}:{passing}")
    before = {plan.batch_id: durable_outcomes(bench.folder, plan) for plan in (big, urgent)}
    bench.folder.queue.unlink()
    ended = [run(bench, "its own", urgent), run(bench, "host again", big)]

    assert died == -signal.SIGKILL
    assert ended == [0, 0]
    assert before[urgent.batch_id], "the guest was being served"
    for plan in (big, urgent):
        assert_accounted(bench.folder, bench.store, plan)
        after = durable_outcomes(bench.folder, plan)
        kept = before[plan.batch_id]
        assert {index: after[index] for index in kept} == kept
