"""An engine that dies a few times in each of many runs is told as one that dies often."""

import pytest

from batch_orchestration.domain.alert_book import AlertBook
from batch_orchestration.domain.alerts import AlertKind
from batch_orchestration.domain.health import Level
from batch_orchestration.domain.run_account import RunAccount
from batch_orchestration.services.alert_findings import from_health
from batch_orchestration.storage.accounts import write_account
from batch_orchestration_tests.builders import NOW
from batch_orchestration_tests.health_bench import HealthBench


@pytest.mark.parametrize(("ago", "level"), [(600, Level.DEGRADED), (7200, Level.HEALTHY)])
def test_restarts_are_counted_over_the_runs_of_a_batch_of_late(tmp_path, ago, level):
    bench = HealthBench(tmp_path)
    bench.folder.plan_path("b-1").parent.mkdir(parents=True)
    for run_id in ("run-1", "run-2", "run-3"):  # the account of the run at work is not added twice
        write_account(
            bench.folder,
            RunAccount(batch_id="b-1", run_id=run_id, updated_at=NOW - ago, engine_restarts=2.0),
        )

    bench.beat("run-3", batch_id="b-1", restarts=2, window=8)

    assert bench.find("engine:run-3").level is level


def test_the_alert_is_of_the_batch_and_goes_on_with_its_next_run(tmp_path):
    bench = HealthBench(tmp_path)
    keys = set()
    for run_id in ("run-1", "run-2"):
        bench.beat(run_id, batch_id="b-1", restarts=9)
        bench.watch()
        book = AlertBook(began=NOW, cursor=NOW)
        seen = from_health(bench.settings, bench.folder, book, bench.now)
        keys |= {a.key for a in seen.conditions if a.kind is AlertKind.ENGINE_RESTARTS}

    assert keys == {"engine_restarts:b-1"}
