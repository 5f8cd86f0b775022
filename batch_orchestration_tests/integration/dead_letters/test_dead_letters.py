"""Dead letters over a real store and journals: replayed, discarded, taken out as a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.core.dead_letters import DeadLetterState, Selection
from batch_orchestration.core.errors import DeadLetterError, EngineDied, JournalInUse, PlanMismatch
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode
from batch_orchestration.dead_letters import actions as dead_letters
from batch_orchestration.engines.base import Engine
from batch_orchestration.files.journal import read_journal
from batch_orchestration.files.kept_input import ChunkRef, settled_requests
from batch_orchestration.store import rows
from batch_orchestration.store.operations import Operations, open_replays
from batch_orchestration_tests.support.builders import (
    NOW,
    make_provenance,
)
from batch_orchestration_tests.support.letter_bench import LetterBench, number_of, refusing
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> LetterBench:
    return LetterBench(tmp_path_factory.mktemp("answered"))


@pytest.fixture
def bench(answered: LetterBench, tmp_path: Path) -> LetterBench:
    return answered.copied(tmp_path)


# --- replay ---------------------------------------------------------------------------------------


def test_a_replay_moves_answered_letters_into_the_output(bench: LetterBench) -> None:
    bench.assemble()
    bench.ask()
    engine = ScriptedEngine()

    report = bench.replay(1, engine)

    assert (report.answered, report.failed) == (3, 0)
    assert engine.submissions.total() == 3
    assert bench.states() == {3: "resolved", 4: "resolved", 17: "resolved"}
    assert [json.loads(line)["custom_id"] for line in bench.lines("output.jsonl")] == [
        f"request-{number}" for number in range(25)
    ]
    assert bench.lines("errors.jsonl") == []
    bench.assert_accounts_add_up()


def test_a_letter_that_fails_again_is_dead_with_its_whole_history(bench: LetterBench) -> None:
    bench.ask()

    bench.replay(1, refusing(4))

    (letter,) = bench.store.dead_letters(bench.batch_id, Selection())
    assert letter.request.index == 4
    assert letter.request.attempts == 2
    assert [attempt.code for attempt in letter.request.failed_attempts] == ["engine_refused"]
    assert letter.request.provenance.run_id == "replay-run"
    assert letter.first_failed_at < letter.last_failed_at
    # The test's clock of the request for a replay is not the journal's.
    assert sorted(bench.events(4, "state, actor, coalesce(operation, 0)")) == [
        ("dead", "replay-run", 1),
        ("dead", "run-1", 0),
        ("replaying", "tester", 1),
    ]
    bench.assert_accounts_add_up()


def test_an_answered_letter_keeps_its_failures_beside_its_answer(bench: LetterBench) -> None:
    bench.ask(Selection(custom_ids=("request-17",)))

    bench.replay(1)

    settled = list(bench.store.settled(bench.batch_id))[17]
    assert isinstance(settled.outcome, Completion)
    assert settled.attempts == 2
    assert [attempt.code for attempt in settled.failed_attempts] == ["engine_refused"]
    (letter,) = bench.store.dead_letters(
        bench.batch_id, Selection(states=(DeadLetterState.RESOLVED,))
    )
    assert isinstance(letter.request.outcome, Failure)
    assert letter.resolved_at == settled.settled_at
    assert bench.states() == {3: "dead", 4: "dead", 17: "resolved"}


@pytest.mark.parametrize("engine", [ScriptedEngine, lambda: refusing(3, 4, 17)])
def test_a_replay_writes_no_more_text_than_a_transaction_may_have(
    bench: LetterBench, engine: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of a commit is a multiple of its texts, and a replay has up to 10,000 letters."""
    texts: list[str] = []

    def spying(db: Any, table: str, found: Any, columns: Any) -> Any:
        named = [name for name in ("response", "body") if name in columns]
        texts.extend(row[name] for row in found for name in named if row.get(name))
        return incoming(db, table, found, columns)

    incoming = rows._incoming
    monkeypatch.setattr(rows, "_incoming", spying)
    monkeypatch.setattr(rows, "BUDGET_BYTES", 0)
    bench.ask()

    bench.replay(1, engine())

    assert texts == []
    assert all(request.body for request in bench.store.failures(bench.batch_id))
    bench.assert_accounts_add_up()


def test_letters_are_selected_by_code_id_and_number(bench: LetterBench) -> None:
    assert bench.ask(Selection(limit=1)).replays[0].indices == (3,)
    assert bench.ask(Selection(custom_ids=("request-17", "none"))).replays[0].indices == (17,)
    assert bench.ask(Selection(codes=(FailureCode.ENGINE_REFUSED,))).replays[0].indices == (4,)
    with pytest.raises(DeadLetterError, match="3 are being replayed"):
        bench.ask()
    with pytest.raises(DeadLetterError, match="matches the selection"):
        bench.ask(Selection(codes=(FailureCode.TIMEOUT,)))


def test_overrides_reach_the_engine_and_mark_the_answers(bench: LetterBench) -> None:
    bench.ask(overrides={"max_tokens": 7, "temperature": 0.5, "model": "tiny"})
    bodies: list[dict] = []

    def script(body: bytes, submitted: int):
        bodies.append(json.loads(body))

    bench.replay(1, ScriptedEngine(script))

    assert {(body["max_tokens"], body["temperature"], body["model"]) for body in bodies} == {
        (7, 0.5, "tiny")
    }
    assert all("question" in body["messages"][0]["content"] for body in bodies)
    settled = {request.index: request for request in bench.store.settled(bench.batch_id)}
    assert settled[3].provenance.settings_hash != bench.plan.settings_hash
    assert settled[0].provenance.settings_hash == bench.plan.settings_hash
    (asked,) = [
        reason for state, reason in bench.events(3, "state, reason") if state == "replaying"
    ]
    assert json.loads(asked)["max_tokens"] == 7


def test_a_replay_has_a_fresh_budget_of_attempts(tmp_path: Path) -> None:
    def trouble(body: bytes, submitted: int):
        if number_of(body) == 2:
            return Failure(code=FailureCode.TIMEOUT, message="scripted")
        return None

    bench = LetterBench(tmp_path, failing=(), requests=5)
    plan = bench.admitted(6)
    bench.run(plan, ScriptedEngine(trouble))
    bench.plan, bench.batch_id = plan, plan.batch_id
    bench.ask()
    again = ScriptedEngine(trouble)

    bench.replay(1, again)

    assert again.submissions.total() == 3
    (letter,) = bench.store.dead_letters(plan.batch_id, Selection())
    assert letter.request.attempts == 6
    assert len(letter.request.failed_attempts) == 5


def test_running_a_replay_again_asks_nothing_and_changes_nothing(bench: LetterBench) -> None:
    bench.ask()
    bench.replay(1, refusing(4))
    before, idle = bench.contents(), ScriptedEngine()

    report = bench.replay(1, idle)

    assert (report.answered, report.failed) == (2, 1)
    assert idle.starts == 0
    assert bench.contents() == before


def test_asking_with_the_same_key_is_asking_once(bench: LetterBench) -> None:
    first = bench.ask(request_key="run-7")
    bench.replay(1, refusing(4))

    again = bench.ask(request_key="run-7")

    assert [replay.number for replay in again.replays] == [first.replays[0].number]
    assert bench.states()[4] == "dead"
    assert bench.ask(request_key="run-8").replays[0].indices == (4,)


def test_a_replay_that_is_running_cannot_be_run_twice(bench: LetterBench) -> None:
    (replay,) = bench.ask().replays
    operations = Operations(bench.folder, bench.batch_id)
    engine = ScriptedEngine()

    with (
        operations.open_journal(replay, provenance=make_provenance("other"), at=NOW),
        pytest.raises(JournalInUse),
    ):
        bench.replay(1, engine)

    assert engine.starts == 0


def test_a_poison_letter_is_isolated_and_its_neighbours_are_answered(bench: LetterBench) -> None:
    bench.ask()

    def script(body: bytes, submitted: int):
        return EngineDied("scripted") if number_of(body) == 4 else None

    bench.replay(1, ScriptedEngine(script), engine_restarts=10)

    (letter,) = bench.store.dead_letters(bench.batch_id, Selection())
    assert letter.request.index == 4
    assert letter.request.outcome.code is FailureCode.ENGINE_KILLED
    bench.assert_accounts_add_up()


def test_an_engine_that_is_lost_keeps_the_letters_for_the_next_start(bench: LetterBench) -> None:
    bench.ask()

    def script(body: bytes, submitted: int):
        return EngineDied("scripted") if number_of(body) == 17 else None

    with pytest.raises(EngineDied):
        bench.replay(1, ScriptedEngine(script), engine_restarts=0, in_flight=1)

    assert bench.states() == {3: "resolved", 4: "resolved", 17: "replaying"}
    assert open_replays(bench.folder) == [(bench.batch_id, 1)]
    bench.assert_accounts_add_up()
    engine = ScriptedEngine()
    bench.replay(1, engine)
    assert engine.submissions.total() == 1
    assert open_replays(bench.folder) == []


def test_other_settings_stop_a_replay_unless_it_is_forced(bench: LetterBench) -> None:
    bench.ask(Selection(limit=1))
    bench.ask(force=True)
    other = {"engine": "simulated", "model": "another"}

    with pytest.raises(PlanMismatch):
        bench.replay(1, answer_settings=other)
    bench.replay(2, answer_settings=other)

    assert bench.states() == {3: "replaying", 4: "resolved", 17: "resolved"}


def test_a_batch_that_still_runs_can_replay_what_it_has_committed(tmp_path: Path) -> None:
    bench = LetterBench(tmp_path, failing=(), requests=5)
    plan = bench.admitted(25)
    bench.run(plan, refusing(3), numbers=[0])
    bench.plan, bench.batch_id = plan, plan.batch_id
    bench.ask()

    report = bench.replay(1)

    assert report.assembly is None
    assert bench.store.batch(plan.batch_id).pending == 15
    bench.run(plan, ScriptedEngine(), run_id="run-2")
    bench.assert_accounts_add_up()
    assert bench.store.batch(plan.batch_id).failed == 0


def test_very_many_letters_become_several_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letters, "REPLAY_SIZE", 4)
    bench = LetterBench(tmp_path, failing=tuple(range(10)))

    asked = bench.ask()

    assert [len(replay.indices) for replay in asked.replays] == [4, 4, 2]
    for replay in asked.replays:
        bench.replay(replay.number)
    assert set(bench.states().values()) == {"resolved"}


# --- a commit after a replay ----------------------------------------------------------------------


def test_committing_a_chunk_again_undoes_neither_replay_nor_discard(bench: LetterBench) -> None:
    bench.ask(Selection(custom_ids=("request-3",)))
    bench.replay(1)
    bench.discard(Selection(custom_ids=("request-4",)))
    before = bench.contents()

    for number in range(3):
        bench.recommit(number)

    after = bench.contents()
    for table in ("results", "failed_requests", "dead_letter_events"):
        assert after[table] == before[table]
    assert bench.states() == {3: "resolved", 4: "discarded", 17: "dead"}
    bench.assert_accounts_add_up()


def test_a_chunk_that_is_committed_during_a_replay_leaves_it_its_letters(
    bench: LetterBench,
) -> None:
    bench.ask()

    bench.recommit(0)

    assert set(bench.states().values()) == {"replaying"}
    bench.replay(1)
    bench.assert_accounts_add_up()


def test_a_dead_letter_that_a_later_commit_answers_is_resolved_and_stays(
    bench: LetterBench,
) -> None:
    ref = ChunkRef.of(bench.plan, 0, bench.folder)
    other = LetterBench(bench.folder.root / "other", failing=())
    journal = ChunkRef.of(other.plan, 0, other.folder).journal_path
    entries = {entry.index: entry for entry in read_journal(journal)}

    bench.store.commit_chunk(
        bench.batch_id, 0, settled_requests(ref, entries), run_id="again", at=NOW, seconds=1.0
    )

    assert bench.states() == {3: "resolved", 4: "resolved", 17: "dead"}
    assert bench.history(3) == ["dead", "resolved"]
    bench.assert_accounts_add_up()
    bench.recommit(0)
    assert bench.states() == {3: "dead", 4: "dead", 17: "dead"}
    bench.assert_accounts_add_up()


# --- discard --------------------------------------------------------------------------------------


def test_a_discarded_letter_stays_with_its_reason_and_in_the_error_file(
    bench: LetterBench,
) -> None:
    count = bench.discard(Selection(limit=2), reason="  the customer left ")
    bench.assemble()

    letters = bench.store.dead_letters(
        bench.batch_id, Selection(states=(DeadLetterState.DISCARDED,))
    )
    assert count == 2
    assert [letter.discard_reason for letter in letters] == ["the customer left"] * 2
    assert letters[0].discarded_at == NOW + 15
    assert sorted(bench.history(3)) == ["dead", "discarded"]
    assert len(bench.lines("errors.jsonl")) == 3
    bench.assert_accounts_add_up()


def test_a_discard_without_a_reason_is_refused(bench: LetterBench) -> None:
    with pytest.raises(DeadLetterError, match="needs a reason"):
        bench.discard(reason="  ")

    assert set(bench.states().values()) == {"dead"}


def test_letters_of_an_abandoned_replay_can_be_taken_back_and_discarded(
    bench: LetterBench,
) -> None:
    bench.ask()
    with pytest.raises(DeadLetterError, match="3 are being replayed"):
        bench.discard()
    wanted = Selection(states=(DeadLetterState.REPLAYING,), custom_ids=("request-4",))

    assert bench.discard(wanted) == 1

    assert bench.states() == {3: "dead", 4: "discarded", 17: "dead"}
    assert open_replays(bench.folder) == []


def test_letters_of_a_running_replay_cannot_be_discarded(bench: LetterBench) -> None:
    (replay,) = bench.ask().replays
    operations = Operations(bench.folder, bench.batch_id)
    everything = Selection(states=(DeadLetterState.REPLAYING,))

    with (
        operations.open_journal(replay, provenance=make_provenance(), at=NOW),
        pytest.raises(DeadLetterError, match=r"replay 1 .* is running and includes"),
    ):
        bench.discard(everything)

    assert set(bench.states().values()) == {"replaying"}


def test_what_was_kept_but_not_applied_is_applied_by_whoever_comes_next(
    bench: LetterBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill between the two."""
    with monkeypatch.context() as killed:
        killed.setattr(Operations, "apply_to", lambda self, store: None)
        bench.discard(Selection(limit=1))
    assert bench.states()[3] == "dead"

    bench.assemble()

    assert bench.states()[3] == "discarded"
