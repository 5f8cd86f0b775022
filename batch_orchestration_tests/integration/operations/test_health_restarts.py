"""An engine that dies a few times in each of many runs is told as one that dies often."""

import pytest

from batch_orchestration.operations.alerts.findings import from_health
from batch_orchestration.operations.alerts.state import AlertState
from batch_orchestration.operations.health.report import AlertKind, Level
from batch_orchestration.workers.utilization import TimeBreakdown
from batch_orchestration.workers.utilization_files import write_account
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.health_bench import HealthBench


@pytest.mark.parametrize(("ago", "level"), [(600, Level.DEGRADED), (7200, Level.HEALTHY)])
def test_restarts_are_counted_over_the_runs_of_a_batch_of_late(tmp_path, ago, level):
    bench = HealthBench(tmp_path)
    bench.folder.plan_path("b-1").parent.mkdir(parents=True)
    for run_id in ("run-1", "run-2", "run-3"):  # the account of the run at work is not added twice
        write_account(
            bench.folder,
            TimeBreakdown(batch_id="b-1", run_id=run_id, updated_at=NOW - ago, engine_restarts=2.0),
        )

    bench.beat("run-3", batch_id="b-1", restarts=2, window=8)

    assert bench.find("engine:run-3").level is level


def test_the_alert_is_of_the_batch_and_goes_on_with_its_next_run(tmp_path):
    bench = HealthBench(tmp_path)
    checks = set()
    for run_id in ("run-1", "run-2"):
        bench.beat(run_id, batch_id="b-1", restarts=9)
        bench.watch()
        state = AlertState(began=NOW, cursor=NOW)
        seen = from_health(bench.in_force, bench.folder, state, bench.now)
        checks |= {f.check for f in seen.findings if f.kind is AlertKind.ENGINE_RESTARTS}

    assert checks == {"engine_restarts:b-1"}
