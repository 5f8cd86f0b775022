"""A replay that is killed with SIGKILL at any moment loses no answer and asks none twice."""

import signal
from pathlib import Path

import pytest

from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.dead_letters.replaying import run_replay
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.store.operations import open_replays
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.forks import run_forked
from batch_orchestration_tests.support.letter_bench import LetterBench
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import make_policy

FAILING = tuple(range(0, 30, 2))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> LetterBench:
    """A delivered batch with a replay that was asked for."""
    bench = LetterBench(tmp_path_factory.mktemp("asked"), failing=FAILING, requests=40)
    bench.assemble()
    bench.ask()
    return bench


def replay(root: Path, batch_id: str) -> None:
    folder = DataFolder(root)
    run_replay(
        batch_id,
        1,
        RunContext(
            engine=ScriptedEngine(),
            folder=folder,
            store=Store(folder.duckdb),
            run_id="killed",
            policy=make_policy(in_flight=4),
        ),
    )


@pytest.mark.parametrize(
    "point",
    [
        "before_submit:1",
        "after_submit:6",
        "before_outcome:5",
        "after_outcome:1",
        "after_outcome:9",
        "after_outcome:15",
        "before_errors_rename",
        "before_output_rename",
        "before_report_rename",
        "after_renames",
    ],
)
def test_a_killed_replay_goes_on_where_it_stopped(
    asked: LetterBench, tmp_path: Path, point: str
) -> None:
    bench = asked.copied(tmp_path)

    assert run_forked(replay, tmp_path, bench.batch_id, crash_point=point) == -signal.SIGKILL

    assert open_replays(bench.folder) == [(bench.batch_id, 1)]
    assert set(bench.states().values()) <= {"replaying", "resolved"}
    bench.assert_accounts_add_up()
    (journal,) = bench.folder.journals.glob("*/dead_letters/*.journal")
    answered = journal.read_bytes().count(b'"type":"outcome"')
    engine = ScriptedEngine()
    report = bench.replay(1, engine)
    assert (report.answered, report.failed) == (len(FAILING), 0)
    assert engine.submissions.total() == len(FAILING) - answered
    assert bench.states() == dict.fromkeys(FAILING, "resolved")
    assert len(bench.lines("output.jsonl")) == 40
    assert bench.lines("errors.jsonl") == []
    assert bench.store.dead_letters(bench.batch_id, Selection()) == []
    bench.assert_accounts_add_up()
