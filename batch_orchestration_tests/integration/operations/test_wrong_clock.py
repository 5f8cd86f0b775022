"""A wrong clock ends no batch and deletes nothing; what is overdue ends once it is right."""

from pathlib import Path

import pytest

from batch_orchestration.operations.housekeeping.clean import Cleanup, Part, run_cleanup
from batch_orchestration.operations.housekeeping.retention import clean_journals
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.letter_bench import LetterBench
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench

DAY = 86400.0


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


def test_a_look_that_doubts_the_clock_expires_nothing_and_a_later_one_does(
    bench: Workbench,
) -> None:
    plan = bench.admit_now(10)
    bench.let_expire(plan)

    assert bench.end_overdue(doubt="the clock jumped") == {}
    assert bench.folder.early_end(plan.batch_id).read() is None
    assert plan.batch_id in bench.end_overdue()


def test_a_doubtful_clock_does_not_keep_a_person_from_cancelling(bench: Workbench) -> None:
    plan = bench.admit_now(10)

    early_ends = bench.end_overdue(terminated="run-1", doubt="the clock jumped")

    assert early_ends[plan.batch_id].actor == "run-1"


def test_a_run_whose_clock_has_jumped_answers_everything(bench: Workbench) -> None:
    """No look was ever made: the run's own is the first."""
    plan = bench.admit_now(20)
    bench.let_expire(plan)
    (bench.folder.root / "clock.json").unlink()

    bench.run(plan, ScriptedEngine())

    assert bench.folder.early_end(plan.batch_id).read() is None
    assert bench.indices(plan) == list(range(20))


def test_housekeeping_with_a_clock_that_is_years_ahead_removes_nothing_and_says_why(
    tmp_path: Path,
) -> None:
    bench = LetterBench(tmp_path)
    bench.assemble()
    journals = set(bench.folder.journals.rglob("*.journal"))
    part = Part("journals", 30 * DAY, clean_journals)
    years_ahead = NOW + 3650 * DAY
    doubtful = Cleanup(bench.folder, bench.store, now=years_ahead, doubt="the clock jumped")

    [result] = run_cleanup([part], doubtful, clock=lambda: 0.0).results

    assert result.problem == "not done: the clock jumped"
    assert set(bench.folder.journals.rglob("*.journal")) == journals
    believed = Cleanup(bench.folder, bench.store, now=years_ahead)
    [result] = run_cleanup([part], believed, clock=lambda: 0.0).results
    assert result.removed == 1
