"""Answers of megabytes: little memory, and the same bytes wherever they are asked for."""

import signal
from pathlib import Path

import msgspec
import pytest

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.core.errors import FileDamaged
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.delivery.lines import output_line
from batch_orchestration.delivery.outbox import OutboxFiles
from batch_orchestration.delivery.snapshot import read_snapshot, take_snapshot
from batch_orchestration.files import journal_reading as replay
from batch_orchestration.files.kept_input import ChunkRef
from batch_orchestration.lifecycle.close_out import commit_ended
from batch_orchestration.operations.housekeeping.clean import Cleanup
from batch_orchestration.operations.housekeeping.retention import clean_inputs, clean_journals
from batch_orchestration.operations.recovery import find_problem, recover
from batch_orchestration.store import rows
from batch_orchestration_tests.support.builders import (
    NOW,
    make_completion,
    make_line,
    make_plan,
    write_plan,
)
from batch_orchestration_tests.support.large_answers import (
    LARGE,
    MIB,
    answered,
    large_completion,
    large_failure,
    make_room_scarce,
    mixed_outcomes,
    run_worker,
)
from batch_orchestration_tests.support.letter_bench import TABLES, LetterBench
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench

DAY = 86_400.0


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two or three large answers of a chunk fit into the store."""
    monkeypatch.setattr(rows, "BUDGET_BYTES", rows.BUDGET_BYTES)
    monkeypatch.setattr(replay, "HELD_BYTES", replay.HELD_BYTES)
    make_room_scarce()


def lines_of(bench: Workbench, plan: BatchPlan) -> list[bytes]:
    """What whoever asks now is given."""
    places = {"folder": bench.folder, "store": bench.store}
    finished = take_snapshot(plan.batch_id, **places)
    return [output_line(plan.batch_id, request) for request in read_snapshot(finished, **places)]


def tables_of(bench: Workbench) -> dict[str, list[tuple]]:
    return {
        name: sorted(bench.store.query(f"SELECT {columns} FROM {name}")[1], key=repr)
        for name, columns in TABLES.items()
        # Histories are written in the order of commits.
        if name not in ("chunks", "batches")
    }


def deliver(bench: Workbench, plan: BatchPlan) -> dict[str, bytes]:
    assemble(plan.batch_id, folder=bench.folder, store=bench.store, clock=lambda: NOW + 50)
    files = OutboxFiles(bench.folder.outbox_path(plan.batch_id))
    return {path.name: path.read_bytes() for path in (files.output, files.errors)}


def left_to_journals(bench: Workbench) -> list[str]:
    _, found = bench.store.query(
        "SELECT DISTINCT split_part(response_at, ':', 1) FROM request_outcomes"
        " WHERE response_at IS NOT NULL ORDER BY ALL"
    )
    return [name for (name,) in found]


@pytest.mark.parametrize(
    ("answers", "size", "per_chunk"), [(200, MIB, 200), (4000, 16_000, 500)], ids=["large", "many"]
)
def test_commits_take_little_memory_however_large_or_many_the_answers_are(
    tmp_path: Path, answers: int, size: int, per_chunk: int
) -> None:
    """The first took 1.6 GiB; the second grew with each commit, by DuckDB's row groups."""
    bench = Workbench(tmp_path)
    plan = answered(bench, [large_completion(size)] * answers, per_chunk=per_chunk)

    worker = run_worker(tmp_path)

    assert worker.returncode == 0, worker.stderr
    assert int(worker.stdout) < 350
    assert bench.indices(plan) == list(range(answers))


@pytest.mark.usefixtures("scarce")
def test_large_answers_are_the_same_bytes_from_journal_store_files_and_a_store_made_anew(
    tmp_path: Path,
) -> None:
    bench = Workbench(tmp_path)
    outcomes = mixed_outcomes()
    plan = answered(bench, outcomes)
    before = lines_of(bench, plan)
    assert [bytes(outcomes[i].body) in before[i] for i in range(6)] == [True] * 6

    bench.run(plan, ScriptedEngine())
    committed, tables = lines_of(bench, plan), tables_of(bench)
    files = deliver(bench, plan)
    bench.folder.duckdb.unlink()
    problem = find_problem(folder=bench.folder, store=bench.store)
    recovery = recover(folder=bench.folder, problem=str(problem), clock=lambda: NOW + 60)

    assert recovery.complete
    assert left_to_journals(bench) == [f"journals/{plan.batch_id}/00000.1.journal"]
    assert committed == lines_of(bench, plan) == before
    assert tables_of(bench) == tables
    assert deliver(bench, plan) == files
    assert sorted(b"".join(files.values()).splitlines(keepends=True)) == sorted(before)


@pytest.mark.parametrize("moment", ["before_commit", "after_commit"])
@pytest.mark.usefixtures("scarce")
def test_no_large_answer_is_lost_or_asked_again_by_a_kill_about_its_commit(
    tmp_path: Path, moment: str
) -> None:
    bench = Workbench(tmp_path)
    plan = answered(bench, mixed_outcomes())
    before = lines_of(bench, plan)

    assert run_worker(tmp_path, "scarce", CRASH_POINT=moment).returncode == -signal.SIGKILL
    assert lines_of(bench, plan) == before
    assert run_worker(tmp_path, "scarce").returncode == 0

    assert lines_of(bench, plan) == before
    bench.store.check_sound()


@pytest.mark.usefixtures("scarce")
def test_journals_that_have_large_answers_outlive_their_retention_and_the_input_does_not(
    tmp_path: Path,
) -> None:
    bench = Workbench(tmp_path)
    plan = answered(bench, mixed_outcomes())
    bench.run(plan, ScriptedEngine())
    before, files = lines_of(bench, plan), deliver(bench, plan)

    def house(days: int) -> Cleanup:
        return Cleanup(bench.folder, bench.store, now=NOW + days * DAY)

    removed = [removal.subject for removal in clean_journals(house(40), 30 * DAY)]
    again = list(clean_journals(house(41), 30 * DAY))
    inputs = list(clean_inputs(house(42), 30 * DAY))

    assert (removed, again, len(inputs)) == ([plan.batch_id], [], 1)
    left = bench.folder.journal_path(plan.batch_id, 0).parent.glob("*.journal")
    assert [path.name for path in left] == ["00000.1.journal"]
    assert lines_of(bench, plan) == before
    assert deliver(bench, plan) == files


@pytest.mark.parametrize("harm", ["bytes", "missing"])
@pytest.mark.usefixtures("scarce")
def test_a_large_answer_that_was_damaged_later_is_named_and_asked_again_by_recover(
    tmp_path: Path, harm: str
) -> None:
    bench = Workbench(tmp_path)
    plan = answered(bench, mixed_outcomes())
    bench.run(plan, ScriptedEngine())
    journal = bench.folder.journal_path(plan.batch_id, 0)
    if harm == "missing":
        journal.rename(tmp_path / "elsewhere")
    else:
        content = bytearray(journal.read_bytes())
        content[len(content) * 3 // 5] ^= 1
        journal.write_bytes(content)

    with pytest.raises(FileDamaged, match=r"00000\.1\.journal .* `.* recover --force`"):
        deliver(bench, plan)
    recover(folder=bench.folder, problem="asked for by --force", clock=lambda: NOW + 60)
    engine = ScriptedEngine()
    bench.run(plan, engine)

    assert len(engine.submissions) == (10 if harm == "missing" else 1)
    assert len(lines_of(bench, plan)) == 12
    deliver(bench, plan)


@pytest.mark.usefixtures("scarce")
def test_large_answers_to_replays_stay_in_the_replays_journal(tmp_path: Path) -> None:
    bench = LetterBench(tmp_path)
    large = [
        large_completion(2 * LARGE),
        large_failure(2 * LARGE, status=400),
        make_completion("small"),
    ]
    bench.ask()
    answers = iter(large)
    bench.replay(1, ScriptedEngine(lambda body, times: next(answers)), in_flight=1)
    lines, contents = lines_of(bench, bench.plan), bench.contents()
    bench.assemble()

    bench.recover()

    assert left_to_journals(bench) == [
        f"journals/{bench.batch_id}/dead_letters/00001-replay.journal"
    ]
    assert bench.contents() == contents
    assert lines_of(bench, bench.plan) == lines
    found = [request.outcome.body for request in bench.store.settled(bench.batch_id)]
    assert [found[index] for index in (3, 4, 17)] == [outcome.body for outcome in large]
    bench.assert_accounts_add_up()


@pytest.mark.usefixtures("scarce")
def test_large_requests_that_a_cancelled_batch_leaves_unasked_are_not_copied_into_the_store(
    tmp_path: Path,
) -> None:
    bench = Workbench(tmp_path)
    content = b"".join(
        make_line(number, body={"model": "m", "messages": [], "user": "x" * 15_000})
        for number in range(8)
    )
    plan = make_plan(content, requests_per_chunk=8)
    write_plan(bench.folder, plan)
    bench.folder.input_path(plan.batch_id).write_bytes(content)
    bench.store.add_batch(plan, at=NOW)
    early_end = EarlyEnd(status=BatchStatus.CANCELLED, at=NOW, actor="me", reason="")

    ref = ChunkRef.of(plan, 0, bench.folder)
    commit_ended(ref, early_end, store=bench.store, run_id="r", at=NOW)

    letters = bench.store.dead_letters(plan.batch_id, Selection())
    assert [len(letter.request.body) > 15_000 for letter in letters] == [True] * 3 + [False] * 5
    assert [msgspec.json.decode(line)["custom_id"] for line in lines_of(bench, plan)] == [
        f"request-{number}" for number in range(8)
    ]
