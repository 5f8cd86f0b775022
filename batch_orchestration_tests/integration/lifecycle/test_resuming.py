"""Batches that go on after they were cancelled or had expired."""

import os
import time

import pytest

from batch_orchestration.core.dead_letters import DeadLetterState, Selection
from batch_orchestration.core.errors import BatchNotFound, IllegalTransition, StoreLocked
from batch_orchestration.dead_letters.actions import request_replay
from batch_orchestration.dead_letters.replaying import run_replay
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.lifecycle.resumption import finish_resumptions, resume
from batch_orchestration.operations.recovery import recover
from batch_orchestration.status.views import view_batch
from batch_orchestration.store.operations import Operations
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import make_completion, make_failure
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine, StickingEngine
from batch_orchestration_tests.support.workbench import Workbench, make_policy


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path / "data")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A cancelled batch; of 60 requests 23 are answered: two chunks, and a part of the third."""
    bench = Workbench(tmp_path_factory.mktemp("half-way"))
    plan, engine = bench.admit_now(60), StickingEngine(answers=23)
    bench.run_until_stuck(plan, engine, lambda: bench.cancel(plan))
    bench.deliver(plan)
    return bench, plan, engine


@pytest.fixture
def half_way(prepared, tmp_path):
    bench, plan, engine = prepared
    return bench.copied(tmp_path / "data"), plan, engine


def refuse_some(body: bytes, times: int):
    return make_failure() if b"question 5" in body else None


def test_only_what_has_no_answer_is_asked_and_the_end_is_as_if_undisturbed(half_way, tmp_path):
    bench, plan, engine = half_way
    answered = [line["custom_id"] for line in bench.lines(plan, "output.jsonl")]

    bench.resume(plan)
    assert bench.store.batch(plan.batch_id).pending == 40
    again = ScriptedEngine()
    bench.finish(plan, again)

    assert sum(again.submissions.values()) == 60 - len(answered) == 37
    asked_twice = again.submissions.keys() & engine.submissions.keys()
    assert len(asked_twice) == engine.aborted, "only what was let go is asked again"
    undisturbed = Workbench(tmp_path / "undisturbed")
    same = undisturbed.admit_now(60)
    undisturbed.finish(same)
    assert same.batch_id == plan.batch_id
    for name in ("output.jsonl", "errors.jsonl"):
        assert bench.lines(plan, name) == undisturbed.lines(same, name)
    assert bench.status(plan) == "completed"
    assert bench.history(plan) == [
        ("cancelling", "tester"),
        ("cancelled", "deliver-1"),
        ("in_progress", "tester"),
        ("finalizing", "deliver-1"),
        ("completed", "deliver-1"),
    ]
    report = (bench.folder.outbox_path(plan.batch_id) / "report.md").read_text()
    assert "**Cancelled**" not in report


def test_dead_letters_of_the_early_end_are_resolved_by_the_later_commit(half_way):
    bench, plan, _ = half_way

    bench.resume(plan)
    bench.finish(plan, ScriptedEngine(refuse_some))

    letters = bench.store.dead_letters(plan.batch_id, Selection(states=()))
    resolved = [x for x in letters if x.state is DeadLetterState.RESOLVED]
    dead = [x for x in letters if x.state is DeadLetterState.DEAD]
    refused = {50 + n for n in range(10)}
    assert {x.request.index for x in dead} == refused
    assert {x.request.index for x in resolved} == set(range(23, 60)) - refused
    assert bench.store.failure_counts(plan.batch_id) == {"engine_refused": 10}
    record = bench.store.batch(plan.batch_id)
    assert (record.completed, record.failed) == (50, 10)


def test_a_batch_may_be_cancelled_and_resumed_again_and_again(half_way):
    bench, plan, _ = half_way

    bench.resume(plan)
    bench.run(plan, ScriptedEngine(), numbers=[2, 3])
    bench.cancel(plan)
    bench.deliver(plan)
    assert len(bench.lines(plan, "output.jsonl")) == 40
    bench.resume(plan)
    engine = ScriptedEngine()
    bench.finish(plan, engine)

    assert sum(engine.submissions.values()) == 20
    assert bench.status(plan) == "completed"
    assert len(bench.lines(plan, "output.jsonl")) == 60


def test_a_batch_cancelled_before_it_began_starts_from_the_beginning(bench):
    plan = bench.admit_now(15)
    bench.cancel(plan)
    bench.deliver(plan)

    bench.resume(plan)

    record = bench.store.batch(plan.batch_id)
    assert (record.chunks_committed, record.completed, record.failed) == (0, 0, 0)
    bench.finish(plan)
    assert len(bench.lines(plan, "output.jsonl")) == 15


def test_an_expired_batch_needs_a_new_window_which_counts_from_now(bench):
    plan = bench.admit_now(25, completion_window="1h", at=time.time() - 7200)
    bench.end_overdue()
    bench.deliver(plan)

    with pytest.raises(IllegalTransition, match=r"window of batch .* is over"):
        bench.resume(plan)
    with pytest.raises(ValueError, match="not a duration"):
        bench.resume(plan, completion_window="soon")
    assert bench.status(plan) == "expired"
    began = time.time()
    resumption = bench.resume(plan, completion_window="2h")

    assert began + 7200 <= resumption.deadline <= time.time() + 7200
    assert bench.end_overdue() == {}
    assert bench.folder.read_plan(plan.batch_id) == plan
    view = view_batch(plan.batch_id, folder=bench.folder, store=bench.store, now=time.time())
    assert view.deadline == resumption.deadline
    bench.finish(plan)
    assert bench.status(plan) == "completed"


def test_what_did_not_end_early_cannot_be_resumed(bench):
    plan = bench.admit_now(5)

    with pytest.raises(IllegalTransition, match="is in_progress"):
        bench.resume(plan)
    bench.cancel(plan)
    with pytest.raises(IllegalTransition, match="is being cancelled"):
        bench.resume(plan)
    bench.deliver(plan)
    bench.resume(plan)
    bench.finish(plan)
    with pytest.raises(IllegalTransition, match="is completed"):
        bench.resume(plan)
    with pytest.raises(BatchNotFound):
        resume("nothing-00000000", folder=bench.folder, store=bench.store, actor="", at=0)


class LockedAtTheEnd(Store):
    """A store that another process locks as soon as its batch was read."""

    def reopen_batch(self, *_, **__):
        raise StoreLocked("held by another process")


def test_a_store_locked_after_the_decision_delays_the_resumption_only(bench):
    plan = bench.admit_now(5)
    bench.cancel(plan)
    bench.deliver(plan)
    bench.store = LockedAtTheEnd(bench.folder.duckdb)

    bench.resume(plan)
    assert bench.status(plan) == "cancelled"

    bench.store = Store(bench.folder.duckdb)
    assert finish_resumptions(folder=bench.folder, store=bench.store) == [plan.batch_id]
    assert bench.status(plan) == "in_progress"


def test_a_resumption_that_was_carried_out_is_left_alone(bench):
    plan = bench.admit_now(5)
    bench.cancel(plan)
    bench.deliver(plan)
    bench.resume(plan)
    bench.cancel(plan)
    bench.deliver(plan)

    assert finish_resumptions(folder=bench.folder, store=bench.store) == []
    assert bench.status(plan) == "cancelled"


def test_a_store_lost_after_a_resumption_goes_on_with_the_rest(half_way):
    bench, plan, _ = half_way
    bench.resume(plan)
    bench.folder.duckdb.unlink()

    recovery = recover(folder=bench.folder, problem="lost", clock=time.time)

    assert recovery.complete
    assert bench.status(plan) == "in_progress"
    engine = ScriptedEngine()
    bench.finish(plan, engine)
    assert sum(engine.submissions.values()) == 37
    assert len(bench.lines(plan, "output.jsonl")) == 60


def replay_of(bench, plan, *numbers):
    """Ask for a replay of these requests; nobody runs it yet."""
    asked = request_replay(
        plan.batch_id,
        Selection(custom_ids=tuple(f"request-{n}" for n in numbers)),
        folder=bench.folder,
        store=bench.store,
        actor="tester",
        at=time.time(),
    )
    (replay,) = asked.replays
    # A run gives way to a replay that was asked for since it began.
    for path in bench.folder.journals.glob("*/dead_letters/*.open.json"):
        os.utime(path, (0, 0))
    return replay


def close(bench, replay):
    """Close a replay that has no outcome."""
    operations = Operations(bench.folder, replay.batch_id)
    operations.close(replay, at=time.time())
    operations.apply_to(bench.store)


def run(bench, replay, script):
    """Run a replay."""
    run_replay(
        replay.batch_id,
        replay.number,
        RunContext(
            engine=ScriptedEngine(script),
            folder=bench.folder,
            store=bench.store,
            run_id="replay",
            policy=make_policy(),
        ),
    )


@pytest.mark.parametrize("order", ["closed before", "closed after the commit", "fails afterwards"])
def test_a_replay_without_an_answer_keeps_no_answer_of_a_resumed_batch_out_of_the_store(
    half_way, order
):
    bench, plan, _ = half_way
    replay = replay_of(bench, plan, 30, 41)
    if order == "closed before":
        close(bench, replay)

    bench.resume(plan)
    bench.finish(plan)
    if order == "closed after the commit":
        close(bench, replay)
    if order == "fails afterwards":
        run(bench, replay, lambda body, times: make_failure())
    bench.deliver(plan)

    assert len(bench.lines(plan, "output.jsonl")) == 60
    assert bench.lines(plan, "errors.jsonl") == []
    record = bench.store.batch(plan.batch_id)
    assert (record.completed, record.failed) == (60, 0)
    recover(folder=bench.folder, problem="lost", clock=time.time)
    assert len(bench.lines(plan, "output.jsonl")) == 60


def test_an_answer_of_a_replay_stands_when_the_batch_is_resumed_and_answers_again(half_way):
    bench, plan, _ = half_way
    replay = replay_of(bench, plan, 30)
    run(bench, replay, lambda body, times: make_completion("of the replay"))

    bench.resume(plan)
    bench.finish(plan)

    lines = {line["custom_id"]: line for line in bench.lines(plan, "output.jsonl")}
    assert len(lines) == 60
    assert "of the replay" in str(lines["request-30"])
