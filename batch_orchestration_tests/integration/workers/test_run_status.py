"""What a run keeps current of itself while it works: by this, stuck is told from slow."""

import asyncio
import io
import threading
import time

import pytest

from batch_orchestration.admission.reading.lines import BatchFileReading, ReadingRules
from batch_orchestration.core.errors import CalibrationFailed, EngineDied
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.estimates.benchmark import calibrate
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration.inference.faults import transient_errors as obstacles
from batch_orchestration.inference.run import run_chunks
from batch_orchestration.operations.housekeeping.clean import Cleanup, Part, Removal, run_cleanup
from batch_orchestration.store.connection import writing
from batch_orchestration.workers import reporter as heart
from batch_orchestration.workers.vitals import RunVitals
from batch_orchestration_tests.support.builders import make_failure, make_input
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench, make_policy


class Noting(RunVitals):
    """Vitals that keep each change of phase, and count the signs of progress in each."""

    def __init__(self):
        self.signs = {}
        super().__init__()

    def note_progress(self):
        super().note_progress()
        self.signs[self.phase] = self.signs.get(self.phase, 0) + 1


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path, lock_seconds=0.2)


def run(bench, plan, engine, vitals, **policy):
    commits = run_chunks(
        {plan.batch_id: range(len(plan.chunks))},
        engine=engine,
        folder=bench.folder,
        store=bench.store,
        run_id="run-1",
        policy=make_policy(**policy),
        vitals=vitals,
    )
    return list(commits)


def test_a_run_says_in_which_phase_it_is_and_how_long_each_may_take(bench):
    plan, vitals, seen = bench.admitted(20), Noting(), []

    def script(body, times):
        seen.append((vitals.phase, vitals.batch_id, vitals.chunk, vitals.patience_seconds))
        assert vitals.in_flight > 0
        assert time.time() - vitals.loop_at < 5
        return

    run(bench, plan, ScriptedEngine(script), vitals, hang_seconds=30.0)

    assert list(vitals.signs) == ["preparing", "starting engine", "feeding", "committing"]
    assert {(phase, batch, patience) for phase, batch, _, patience in seen} == {
        ("feeding", plan.batch_id, 150.0),  # until the first token
        ("feeding", plan.batch_id, 90.0),
    }
    assert {chunk for *_, chunk, _ in seen} == {0, 1}
    assert vitals.signs["feeding"] >= 20
    assert (vitals.phase, vitals.loop_at, vitals.in_flight) == ("committing", None, 0)


def test_a_long_delay_that_the_engine_asks_for_is_a_reason_to_wait_and_no_standstill(
    bench, monkeypatch
):
    """`Retry-After: 3600` with nothing in flight looks just like a worker that is stuck."""
    monkeypatch.setattr(obstacles, "DELAY_POLL_SECONDS", 0.01)
    plan, vitals = bench.admitted(1), Noting()
    overloaded = Failure(
        code=FailureCode.ENGINE_OVERLOADED, message="later", retry_after_seconds=0.5
    )

    run(bench, plan, ScriptedEngine(lambda body, times: None if times else overloaded), vitals)

    assert vitals.signs["feeding"] > 10


def test_a_store_that_somebody_holds_is_a_reason_to_wait_and_no_standstill(bench):
    plan, vitals = bench.admitted(5), Noting()
    commits = run_chunks(
        {plan.batch_id: [0]},
        engine=ScriptedEngine(),
        folder=bench.folder,
        store=bench.store,
        run_id="run-1",
        policy=make_policy(),
        vitals=vitals,
    )
    bench.run(bench.admitted(1), ScriptedEngine())  # the store is there

    with writing(bench.folder.duckdb):
        committed = []
        thread = threading.Thread(target=lambda: committed.extend(commits))
        thread.start()
        deadline = time.monotonic() + 10
        while vitals.signs.get("committing", 0) < 3:
            assert time.monotonic() < deadline, vitals.signs
            time.sleep(0.05)
        assert not committed
    thread.join()

    assert len(committed) == 1


def test_restarts_of_the_engine_are_counted_over_all_tries_of_a_step(bench):
    plan, vitals = bench.admitted(4), RunVitals()
    engine = ScriptedEngine(lambda body, times: EngineDied("gone") if times == 0 else None)

    run(bench, plan, engine, vitals, engine_restarts=20)

    assert vitals.restarts == engine.starts - 1 > 0


def test_admission_delivery_cleaning_and_measuring_give_a_sign_with_each_step(bench, monkeypatch):
    """By one sign in all, healthy work that takes long is stuck, or what is stuck is healthy."""
    vitals = Noting()
    monkeypatch.setattr(heart, "_of_this_process", vitals)

    heart.report_phase("admitting")
    reading = BatchFileReading(ReadingRules(requests_per_chunk=10, max_line_bytes=10_000))
    assert len(list(reading.read(io.BytesIO(make_input(30))))) == 30
    plan = bench.admitted(20)
    bench.run(plan, ScriptedEngine())
    heart.report_phase("delivering")
    assemble(plan.batch_id, folder=bench.folder, store=bench.store, clock=time.time)
    heart.report_phase("cleaning up")
    part = Part("some", 1.0, lambda *_: (Removal(subject=str(n)) for n in range(20)))
    run_cleanup([part], Cleanup(bench.folder, bench.store, now=time.time()), clock=time.time)
    failing = ScriptedEngine(lambda *_: make_failure())
    with pytest.raises(CalibrationFailed):
        asyncio.run(calibrate(failing, EngineInForce(), requests=8, seconds=60.0, run_id="run-1"))

    assert vitals.signs["admitting"] > 30
    assert vitals.signs["delivering"] > 20
    assert vitals.signs["cleaning up"] > 20
    assert vitals.signs["measuring the engine"] > 2
