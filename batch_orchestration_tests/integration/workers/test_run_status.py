"""A run keeps its status current while it works; heartbeats are made from it."""

import asyncio
import io
import threading
import time
from collections import Counter

import msgspec
import pytest

from batch_orchestration.admission.reading.lines import BatchFileReading
from batch_orchestration.core.errors import CalibrationFailed, EngineDied
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.estimates.benchmark import calibrate
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration.inference.faults import transient_errors
from batch_orchestration.operations.housekeeping.clean import Cleanup, Part, Removal, run_cleanup
from batch_orchestration.store.connection import writing
from batch_orchestration.workers import reporter
from batch_orchestration.workers.run_status import RunStatus
from batch_orchestration_tests.support.builders import make_failure, make_input, make_settings
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench


class Noting(RunStatus):
    """A status that counts the signs of progress in each phase."""

    signs: Counter[str] = msgspec.field(default_factory=Counter)

    def note_progress(self):
        super().note_progress()
        self.signs[self.phase] += 1


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path, lock_seconds=0.2)


def test_a_run_says_in_which_phase_it_is_and_how_long_each_may_take(bench):
    plan, status, seen = bench.admitted(20), Noting(), []

    def script(body, times):
        seen.append((status.phase, status.batch_id, status.chunk, status.patience_seconds))
        assert status.in_flight > 0
        assert time.time() - status.loop_at < 5
        return

    bench.run(plan, ScriptedEngine(script), status=status, hang_seconds=30.0)

    assert list(status.signs) == ["preparing", "starting engine", "feeding", "committing"]
    assert {(phase, batch, patience) for phase, batch, _, patience in seen} == {
        ("feeding", plan.batch_id, 150.0),  # until the first token
        ("feeding", plan.batch_id, 90.0),
    }
    assert {chunk for *_, chunk, _ in seen} == {0, 1}
    assert status.signs["feeding"] >= 20
    assert (status.phase, status.loop_at, status.in_flight) == ("committing", None, 0)


def test_a_long_delay_that_the_engine_asks_for_is_a_reason_to_wait_and_no_standstill(
    bench, monkeypatch
):
    """`Retry-After: 3600` with nothing in flight looks just like a worker that is stuck."""
    monkeypatch.setattr(transient_errors, "DELAY_POLL_SECONDS", 0.01)
    plan, status = bench.admitted(1), Noting()
    overloaded = Failure(
        code=FailureCode.ENGINE_OVERLOADED, message="later", retry_after_seconds=0.5
    )

    bench.run(
        plan, ScriptedEngine(lambda body, times: None if times else overloaded), status=status
    )

    assert status.signs["feeding"] > 10


def test_a_store_that_somebody_holds_is_a_reason_to_wait_and_no_standstill(bench):
    plan, status = bench.admitted(5), Noting()
    commits = bench.commits(plan, ScriptedEngine(), status=status)
    bench.run(bench.admitted(1), ScriptedEngine())  # the store is there

    with writing(bench.folder.duckdb):
        committed = []
        thread = threading.Thread(target=lambda: committed.extend(commits))
        thread.start()
        deadline = time.monotonic() + 10
        while status.signs["committing"] < 3:
            assert time.monotonic() < deadline, status.signs
            time.sleep(0.05)
        assert not committed
    thread.join()

    assert len(committed) == 1


def test_restarts_of_the_engine_are_counted_over_all_tries_of_a_step(bench):
    plan, status = bench.admitted(4), RunStatus()
    engine = ScriptedEngine(lambda body, times: EngineDied("gone") if times == 0 else None)

    bench.run(plan, engine, status=status, engine_restarts=20)

    assert status.restarts == engine.starts - 1 > 0


def test_admission_delivery_cleaning_and_measuring_give_a_sign_with_each_step(bench, monkeypatch):
    """By one sign in all, healthy work that takes long is stuck, or what is stuck is healthy."""
    status = Noting()
    monkeypatch.setattr(reporter, "_of_this_process", status)

    reporter.report_phase("admitting")
    reading = BatchFileReading(make_settings())
    assert len(list(reading.read(io.BytesIO(make_input(30))))) == 30
    plan = bench.admitted(20)
    bench.run(plan, ScriptedEngine())
    reporter.report_phase("delivering")
    assemble(plan.batch_id, folder=bench.folder, store=bench.store, clock=time.time)
    reporter.report_phase("cleaning up")
    part = Part("some", 1.0, lambda *_: (Removal(subject=str(n)) for n in range(20)))
    run_cleanup([part], Cleanup(bench.folder, bench.store, now=time.time()), clock=time.time)
    failing = ScriptedEngine(lambda *_: make_failure())
    with pytest.raises(CalibrationFailed):
        asyncio.run(calibrate(failing, EngineInForce(), requests=8, seconds=60.0, run_id="run-1"))

    assert status.signs["admitting"] > 30
    assert status.signs["delivering"] > 20
    assert status.signs["cleaning up"] > 20
    assert status.signs["measuring the engine"] > 2
