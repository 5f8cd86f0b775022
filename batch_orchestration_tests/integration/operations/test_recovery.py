"""The store made anew from what is kept beside it."""

from pathlib import Path

import pytest

from batch_orchestration.core.dead_letters import DeadLetterState, Selection
from batch_orchestration.core.errors import DiskFull, StorageError, StoreDamaged
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.samples import RunSample, append_sample
from batch_orchestration.operations.recovery import find_problem
from batch_orchestration_tests.support.letter_bench import LetterBench, refusing
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine


@pytest.fixture(scope="module")
def delivered(tmp_path_factory: pytest.TempPathFactory) -> LetterBench:
    """A delivered batch with resolved, discarded, replaying and dead letters."""
    bench = LetterBench(tmp_path_factory.mktemp("delivered"), failing=(3, 4, 5, 17, 18))
    bench.assemble()
    bench.ask(Selection(custom_ids=("request-3", "request-4")))
    bench.replay(1, refusing(4))
    bench.discard(Selection(custom_ids=("request-17",)), reason="out of date")
    bench.ask(Selection(custom_ids=("request-18",)), overrides={"max_tokens": 5})
    bench.assemble()
    return bench


@pytest.fixture
def bench(delivered: LetterBench, tmp_path: Path) -> LetterBench:
    return delivered.copied(tmp_path)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "header":
        content[:4096] = bytes(4096)
    elif how == "blocks":
        for place in range(12_288, len(content), 500):
            content[place] ^= 0xFF
    elif how == "truncated":
        del content[12_288:]
    else:
        content[:] = b"not a database at all\n" * 1000
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["deleted", "blocks", "text"])
def test_a_lost_store_is_made_anew_with_the_same_rows(bench: LetterBench, how: str) -> None:
    before, files = bench.contents(), [bench.lines(n) for n in ("output.jsonl", "errors.jsonl")]
    damage(bench.folder.duckdb, how)
    left = bench.folder.duckdb.read_bytes() if how != "deleted" else None

    recovery = bench.recover()

    assert bench.contents() == before
    assert [bench.lines(name) for name in ("output.jsonl", "errors.jsonl")] == files
    assert recovery.complete
    (batch,) = recovery.batches
    assert (batch.status, batch.chunks, batch.of_chunks) == ("completed", 3, 3)
    assert (batch.completed, batch.failed, batch.operations) == (21, 4, 3)
    if left is None:
        assert recovery.set_aside is None
    else:
        assert recovery.set_aside is not None
        assert recovery.set_aside.name.startswith("batch.duckdb.damaged-")
        assert recovery.set_aside.read_bytes() == left
    bench.assert_accounts_add_up()


def test_what_gpus_did_is_in_the_new_store_too(bench: LetterBench) -> None:
    (batch_id,) = bench.folder.batch_ids()
    device = GpuFacts(index=0, uuid="GPU-1", name="Test")
    append_sample(bench.folder, batch_id, RunSample(at=1e9, run_id="run-1", gpus=(device,)))
    damage(bench.folder.duckdb, "deleted")

    bench.recover()

    assert bench.store.query("SELECT run_id, gpu FROM gpu_samples")[1] == [("run-1", "GPU-1")]


def test_what_was_replaying_can_be_replayed_after_the_recovery(bench: LetterBench) -> None:
    damage(bench.folder.duckdb, "deleted")
    bench.recover()

    bench.replay(3)

    assert bench.states() == {
        3: "resolved",
        4: "dead",
        5: "dead",
        17: "discarded",
        18: "resolved",
    }
    assert find_problem(folder=bench.folder, store=bench.store) is None


def test_a_damaged_store_names_the_command_that_mends_it(bench: LetterBench) -> None:
    damage(bench.folder.duckdb, "truncated")

    with pytest.raises(StoreDamaged, match="python -m batch_orchestration recover"):
        list(bench.store.settled(bench.batch_id))


def test_an_unfinished_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    bench = LetterBench(tmp_path, failing=(), requests=5)
    plan = bench.admitted(40)
    bench.run(plan, refusing(3), numbers=[0, 1])
    damage(bench.folder.duckdb, "header")

    recovery = bench.recover()

    batch = next(batch for batch in recovery.batches if batch.batch_id == plan.batch_id)
    assert (batch.status, batch.chunks, batch.of_chunks) == ("in_progress", 2, 4)
    engine = ScriptedEngine()
    bench.run(plan, engine, run_id="run-2")
    assert engine.submissions.total() == 20
    assert bench.indices(plan) == list(range(40))


def test_two_recoveries_keep_both_files(bench: LetterBench) -> None:
    first, second = bench.recover(), bench.recover()

    assert first.set_aside != second.set_aside
    assert first.set_aside is not None
    assert first.set_aside.exists()
    assert second.set_aside is not None
    assert second.set_aside.exists()


def test_what_cannot_be_rebuilt_is_told_and_the_rest_is_rebuilt(bench: LetterBench) -> None:
    # A run makes room for a replay that waits.
    bench.replay(3, ScriptedEngine())
    bench.folder.journal_path(bench.batch_id, 1).unlink()
    other = bench.admitted(7)
    bench.run(other, ScriptedEngine())
    # What is answered needs no input.
    bench.folder.input_path(other.batch_id).unlink()
    bench.run(bench.admitted(8), ScriptedEngine())

    recovery = bench.recover()

    problems = {batch.batch_id: batch.problems for batch in recovery.batches}
    assert "1 chunks were delivered, but their journals are" in problems[bench.batch_id][0]
    assert sorted(map(len, problems.values())) == [0, 0, 1]
    assert not recovery.complete
    # The files that were delivered are not touched.
    assert len(bench.lines("output.jsonl")) + len(bench.lines("errors.jsonl")) == 25


def test_a_recovery_that_fails_leaves_everything_as_it_was(
    bench: LetterBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(bench.folder.duckdb, "header")
    left = bench.folder.duckdb.read_bytes()

    def no_room(*_: object, **__: object) -> None:
        raise DiskFull("no room for the store")

    monkeypatch.setattr("batch_orchestration.store.store.Store.add_batch", no_room)

    with pytest.raises(DiskFull):
        bench.recover()

    assert bench.folder.duckdb.read_bytes() == left
    assert not list(bench.folder.root.glob(".recover-*"))
    assert not list(bench.folder.root.glob("*.damaged-*"))


def test_a_sound_store_has_no_problem_and_an_emptied_one_has(bench: LetterBench) -> None:
    assert find_problem(folder=bench.folder, store=bench.store) is None
    bench.folder.duckdb.unlink()
    assert "is missing" in (find_problem(folder=bench.folder, store=bench.store) or "")

    # Somebody asked the store before the person came: it was made anew, and empty.
    bench.store.batches()

    assert "does not know batches" in (find_problem(folder=bench.folder, store=bench.store) or "")


def test_replays_survive_a_store_that_was_refilled_by_runs(bench: LetterBench) -> None:
    """Nobody called `recover`: admission registered the batch, a run committed its journals."""
    before = bench.contents()
    bench.folder.duckdb.unlink()
    bench.store.add_batch(bench.plan, at=bench.plan.created_at)
    idle = ScriptedEngine()
    bench.run(bench.plan, idle)

    bench.assemble()

    assert idle.starts == 0
    after = bench.contents()
    for table in ("results", "failed_requests", "dead_letter_events"):
        assert after[table] == before[table]


def test_a_damaged_plan_costs_its_batch_only(bench: LetterBench) -> None:
    other = bench.admitted(6)
    bench.run(other, ScriptedEngine())
    bench.folder.plan_path(bench.batch_id).write_text("{")

    recovery = bench.recover()

    problems = {batch.batch_id: batch.problems for batch in recovery.batches}
    assert "damaged" in problems[bench.batch_id][0]
    assert problems[other.batch_id] == []
    with pytest.raises(StorageError):
        bench.folder.read_plan(bench.batch_id)


def test_recover_rebuilds_all_but_what_is_damaged_and_names_that(tmp_path: Path) -> None:
    """One chunk's journal, one decision and one operation are damaged, each of another batch."""
    bench = LetterBench(tmp_path, failing=(17,))
    bench.discard(Selection(custom_ids=("request-17",)), reason="out of date")
    torn, undecided = bench.admitted(30), bench.admitted(6)
    bench.run(torn, ScriptedEngine())
    bench.run(undecided, ScriptedEngine())
    journal = bench.folder.journal_path(torn.batch_id, 1)
    journal.unlink()
    journal.mkdir()
    early_end = bench.folder.early_end(undecided.batch_id).path
    early_end.write_bytes(b"")
    operation = next((bench.folder.journals / bench.batch_id).glob("dead_letters/*-discard.json"))
    operation.write_bytes(b"{")

    recovery = bench.recover()

    assert not recovery.complete
    problems = {batch.batch_id: batch.problems for batch in recovery.batches}
    named = {torn.batch_id: journal, undecided.batch_id: early_end, bench.batch_id: operation}
    for batch_id, path in named.items():
        assert any(str(path) in problem for problem in problems[batch_id]), batch_id
    chunks = {batch.batch_id: batch.chunks for batch in recovery.batches}
    assert chunks == {torn.batch_id: 2, undecided.batch_id: 1, bench.batch_id: 3}


def test_states_after_a_closed_replay_are_the_same_after_a_recovery(bench: LetterBench) -> None:
    bench.discard(Selection(states=(DeadLetterState.REPLAYING,)), reason="never mind")
    before = bench.contents()

    bench.recover()

    assert bench.contents() == before
    assert bench.states()[18] == "discarded"
