"""Journals of batches delivered long ago go; no answer is lost, and none asked for again."""

import json
from pathlib import Path

import pytest

from batch_orchestration.admission.registration import register_missing
from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.core.errors import PlanMismatch
from batch_orchestration.files.kept_input import input_removed_path
from batch_orchestration.operations.housekeeping.clean import Cleanup
from batch_orchestration.operations.housekeeping.retention import clean_inputs, clean_journals
from batch_orchestration.operations.recovery import find_problem
from batch_orchestration.store.operations import open_replays
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.letter_bench import LetterBench
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine

DAY = 86_400.0


@pytest.fixture
def bench(tmp_path: Path) -> LetterBench:
    """A delivered batch of which some requests failed."""
    bench = LetterBench(tmp_path)
    bench.assemble()
    return bench


def prune(bench: LetterBench, *, days_later: float) -> list[str]:
    house = Cleanup(bench.folder, bench.store, now=NOW + days_later * DAY)
    return [removal.subject for removal in clean_journals(house, 30 * DAY)]


def journals(bench: LetterBench) -> list[Path]:
    return list(bench.folder.journal_path(bench.batch_id, 0).parent.glob("*.journal"))


def test_journals_are_kept_for_a_while_after_delivery_and_then_removed(bench: LetterBench) -> None:
    assert prune(bench, days_later=29) == []
    assert len(journals(bench)) == 3

    assert prune(bench, days_later=31) == [bench.batch_id]
    assert journals(bench) == []
    assert prune(bench, days_later=32) == []
    bench.assert_accounts_add_up()


def test_the_journals_of_an_undelivered_batch_stay(tmp_path: Path) -> None:
    bench = LetterBench(tmp_path)

    assert prune(bench, days_later=99) == []
    assert len(journals(bench)) == 3


def test_journals_stay_while_the_output_is_not_whole(bench: LetterBench) -> None:
    output = bench.folder.outbox_path(bench.batch_id) / "output.jsonl"
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[1:]))

    assert prune(bench, days_later=99) == []
    assert len(journals(bench)) == 3


def test_journals_stay_while_a_replay_is_not_over(bench: LetterBench) -> None:
    bench.ask()

    assert prune(bench, days_later=99) == []
    assert len(journals(bench)) == 3


def test_chunks_without_journals_are_handed_out_again_and_not_asked_again(
    bench: LetterBench,
) -> None:
    before = bench.contents()
    prune(bench, days_later=31)
    engine = ScriptedEngine()

    commits = bench.run(bench.plan, engine)

    assert [commit.reused for commit in commits] == [True] * 3
    assert (engine.starts, dict(engine.submissions)) == (0, {})
    assert bench.contents() == before


def test_dead_letters_can_be_replayed_after_the_journals_are_gone(bench: LetterBench) -> None:
    prune(bench, days_later=31)
    bench.ask(Selection(custom_ids=("request-3",)))

    bench.replay(1)
    bench.assemble()

    assert len(bench.lines("output.jsonl")) == 23
    bench.assert_accounts_add_up()


def test_a_lost_store_comes_back_without_the_batch_which_is_said_and_not_asked_again(
    bench: LetterBench,
) -> None:
    output = bench.lines("output.jsonl")
    prune(bench, days_later=31)
    bench.folder.duckdb.unlink()

    recovery = bench.recover()

    (batch,) = recovery.batches
    assert not recovery.complete
    assert "BATCH_JOURNAL_RETENTION_DAYS" in batch.problems[0]
    assert bench.lines("output.jsonl") == output
    assert find_problem(folder=bench.folder, store=bench.store) is None
    assert register_missing(bench.folder, bench.store, at=NOW) == []
    assert bench.store.batches() == []


def clean_input(bench: LetterBench, *, days_later: float) -> list[str]:
    house = Cleanup(bench.folder, bench.store, now=NOW + days_later * DAY)
    return [removal.subject for removal in clean_inputs(house, 30 * DAY)]


def test_an_input_goes_only_after_the_journals_and_says_what_it_was(bench: LetterBench) -> None:
    path = bench.folder.input_path(bench.batch_id)
    assert clean_input(bench, days_later=99) == []
    prune(bench, days_later=31)

    assert clean_input(bench, days_later=29) == []
    assert clean_input(bench, days_later=31) == [str(path)]

    assert not path.exists()
    removed = json.loads(input_removed_path(bench.plan, bench.folder).read_bytes())
    assert (removed["file_name"], removed["sha256"]) == (bench.plan.file_name, bench.plan.sha256)
    assert clean_input(bench, days_later=99) == []


def test_a_replay_without_its_input_says_why_it_cannot_be(bench: LetterBench) -> None:
    prune(bench, days_later=31)
    clean_input(bench, days_later=31)

    with pytest.raises(PlanMismatch, match="BATCH_INPUT_RETENTION_DAYS"):
        bench.ask(Selection(custom_ids=("request-3",)))

    assert open_replays(bench.folder) == []
    bench.assert_accounts_add_up()


def test_an_input_stays_while_a_replay_needs_it(bench: LetterBench) -> None:
    prune(bench, days_later=31)
    bench.ask()

    assert clean_input(bench, days_later=99) == []
    assert bench.folder.input_path(bench.batch_id).exists()
