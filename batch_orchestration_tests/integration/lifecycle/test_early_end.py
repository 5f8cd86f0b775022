"""Batches that end early: cancelled by people, or expired because their window is over."""

import time
from contextlib import contextmanager

import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import (
    AccountingError,
    BatchNotFound,
    IllegalTransition,
    JournalInUse,
)
from batch_orchestration.delivery.outbox import OutboxFiles
from batch_orchestration.delivery.recount import recount
from batch_orchestration.files.journal import Journal
from batch_orchestration.lifecycle.cancellation import cancel
from batch_orchestration.lifecycle.close_out import fail_unanswered
from batch_orchestration.operations.recovery import recover
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import make_provenance
from batch_orchestration_tests.support.children import child, next_line
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine, StickingEngine
from batch_orchestration_tests.support.workbench import Workbench

HOLD_STORE = """
    import sys, duckdb
    connection = duckdb.connect(sys.argv[1])
    print("held", flush=True)
    sys.stdin.read()
"""
FILES = ("output.jsonl", "errors.jsonl")


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


@contextmanager
def store_held(bench):
    """Let another process hold the store; the bench waits for it for a moment only."""
    patient = bench.store
    bench.store = Store(bench.folder.duckdb, deadline_seconds=0.3)
    with child(HOLD_STORE, bench.folder.duckdb) as holder:
        next_line(holder)
        yield
    bench.store = patient


def set_finalizing(bench, plan):
    """Begin the delivery of a batch, and do no more."""
    bench.store.set_status(
        plan.batch_id, BatchStatus.FINALIZING, at=time.time(), actor="r", reason=""
    )


def check_accounts(bench, plan):
    """Each request is in exactly one file, and the counts of the store are those of the files."""
    counts = recount(plan, OutboxFiles(bench.folder.outbox_path(plan.batch_id)))
    record = bench.store.batch(plan.batch_id)
    assert counts.problem is None
    assert (counts.completed, counts.failed) == (record.completed, record.failed)
    assert record.pending == 0


# --- cancelled in each state ----------------------------------------------------------------------


def test_a_batch_that_waits_to_run_is_cancelled_without_an_engine(bench):
    plan, engine = bench.admit_now(25), ScriptedEngine()

    bench.cancel(plan)
    assert bench.status(plan) == "cancelling"
    assert bench.run(plan, engine) == []
    report = bench.deliver(plan)

    assert engine.starts == 0
    assert bench.history(plan) == [("cancelling", "tester"), ("cancelled", "deliver-1")]
    assert (report.totals.completed, report.totals.failed) == (0, 25)
    check_accounts(bench, plan)


def test_a_running_batch_drops_its_requests_within_seconds(bench):
    plan, engine = bench.admit_now(60), StickingEngine(answers=23)

    commits, seconds = bench.run_until_stuck(
        plan, engine, lambda: bench.cancel(plan, reason="wrong | prompt")
    )

    assert seconds < 5
    assert engine.aborted == engine.stuck == 8
    assert engine.in_flight == 0
    assert [commit.report.number for commit in commits] == [0, 1]
    assert bench.status(plan) == "cancelling"
    states = bench.journals(plan)
    assert sum(len(state.settled) for state in states) == 23
    assert sum(len(state.in_flight) for state in states) == 8
    assert not any(state.suspects or state.failed_attempts for state in states)

    text = bench.deliver(plan).text

    assert bench.status(plan) == "cancelled"
    assert len(bench.lines(plan, "output.jsonl")) == 23
    check_accounts(bench, plan)
    unanswered = bench.lines(plan, "errors.jsonl")[-1]
    assert (unanswered["custom_id"], unanswered["response"]) == ("request-59", None)
    assert unanswered["error"].keys() == {"code", "message"}
    assert "**Cancelled** by tester" in text
    assert "wrong \\| prompt" in text
    assert "37 requests" in text
    assert f"resume {plan.batch_id}" in text
    assert bench.deliver(plan).text == text


def test_cancelling_twice_keeps_the_first_decision(bench):
    plan = bench.admit_now(5)

    first = bench.cancel(plan, reason="first")
    second = bench.cancel(plan, reason="second")
    bench.deliver(plan)
    third = bench.cancel(plan, reason="third")

    assert (first.earlier, second.earlier, third.earlier) == (False, True, True)
    assert first.early_end == second.early_end == third.early_end
    assert (second.over, third.over) == (False, True)
    assert bench.history(plan) == [("cancelling", "tester"), ("cancelled", "deliver-1")]


def test_a_batch_with_an_outcome_for_every_request_cannot_be_cancelled(bench):
    plan = bench.admit_now(15)
    bench.run(plan, ScriptedEngine())

    with pytest.raises(IllegalTransition, match="an outcome for every request"):
        bench.cancel(plan)
    set_finalizing(bench, plan)
    with pytest.raises(IllegalTransition, match="an outcome for every request"):
        bench.cancel(plan)
    bench.deliver(plan)
    with pytest.raises(IllegalTransition, match="is completed"):
        bench.cancel(plan)

    assert bench.status(plan) == "completed"
    assert bench.folder.early_end(plan.batch_id).read() is None


def test_an_expired_batch_cannot_be_cancelled(bench):
    plan = bench.admit_now(5, completion_window="1s", at=time.time() - 5)
    bench.end_overdue()

    with pytest.raises(IllegalTransition, match="has expired"):
        bench.cancel(plan)
    bench.deliver(plan)
    with pytest.raises(IllegalTransition, match="is expired"):
        bench.cancel(plan)


def test_an_unknown_batch_cannot_be_cancelled(bench):
    where = {"folder": bench.folder, "store": bench.store}

    with pytest.raises(BatchNotFound):
        cancel("nothing-00000000", **where, actor="", reason="", at=0)


def test_a_batch_that_the_store_does_not_have_yet_is_cancelled_as_soon_as_it_has(bench):
    """Between plan and record of an admission."""
    plan = bench.admit_now(5)
    bench.folder.duckdb.unlink()

    bench.cancel(plan)
    bench.store.add_batch(plan, at=time.time())
    early_ends = bench.end_overdue()
    bench.deliver(plan)

    assert early_ends.keys() == {plan.batch_id}
    assert bench.status(plan) == "cancelled"


def test_a_locked_store_delays_the_status_but_not_the_decision(bench):
    plan = bench.admit_now(5)

    with store_held(bench):
        bench.cancel(plan)
        assert bench.folder.early_end(plan.batch_id).read() is not None

    assert bench.status(plan) == "in_progress"
    bench.end_overdue()
    assert bench.status(plan) == "cancelling"


def test_a_cancellation_after_delivery_began_is_void(bench):
    """Only possible while the store is locked: its status cannot be read then."""
    plan = bench.admit_now(5)
    bench.run(plan, ScriptedEngine())
    set_finalizing(bench, plan)
    with store_held(bench):
        bench.cancel(plan)

    assert bench.end_overdue() == {}
    bench.deliver(plan)

    assert bench.status(plan) == "completed"
    assert bench.folder.early_end(plan.batch_id).read() is None


# --- how a batch is closed out --------------------------------------------------------------------


def test_a_batch_that_does_not_end_early_is_not_closed_out(bench):
    plan = bench.admit_now(15)

    with pytest.raises(AccountingError):
        bench.deliver(plan)

    assert bench.committed(plan) == set()


def test_nothing_is_closed_out_while_a_run_is_still_at_work(bench):
    plan = bench.admit_now(25)
    bench.cancel(plan)
    path, at = bench.folder.journal_path(plan.batch_id, 2), time.time()
    journal = Journal.open(
        path, batch_id=plan.batch_id, number=2, provenance=make_provenance(), at=at
    )
    where = {"folder": bench.folder, "store": bench.store}

    with journal, pytest.raises(JournalInUse):
        list(
            fail_unanswered(
                plan.batch_id, **where, run_id="d", clock=time.time, patience_seconds=0.5
            )
        )

    assert bench.committed(plan) == set()


def test_a_store_that_stays_locked_does_not_delay_the_end_of_the_run(bench):
    plan, engine = bench.admit_now(60), StickingEngine(answers=23)

    with store_held(bench):
        commits, seconds = bench.run_until_stuck(plan, engine, lambda: bench.cancel(plan))

    assert commits == []
    assert seconds < 10
    bench.deliver(plan)
    assert len(bench.lines(plan, "output.jsonl")) == 23
    assert bench.status(plan) == "cancelled"


# --- expiry ---------------------------------------------------------------------------------------


def test_a_batch_whose_window_is_over_expires_at_the_next_tick(bench):
    plan = bench.admit_now(25, completion_window="1h", at=time.time() - 3601)
    in_time = bench.admit_now(24, completion_window="1h", at=time.time() - 3000)

    early_ends = bench.end_overdue()
    bench.deliver(plan)

    assert early_ends.keys() == {plan.batch_id}
    assert bench.status(in_time) == "in_progress"
    assert bench.history(plan) == [("finalizing", "sensor"), ("expired", "deliver-1")]
    codes = [line["error"]["code"] for line in bench.lines(plan, "errors.jsonl")]
    assert codes == ["batch_expired"] * 25
    check_accounts(bench, plan)


def test_a_run_notices_by_itself_that_the_window_is_over(bench):
    plan = bench.admit_now(60, completion_window="2s")

    began = time.monotonic()
    commits = bench.run(plan, StickingEngine(answers=23))
    seconds = time.monotonic() - began

    assert seconds < 60
    assert [commit.report.number for commit in commits] == [0, 1]
    early_end = bench.folder.early_end(plan.batch_id).read()
    assert (early_end.status, early_end.actor) == ("expired", "run-1")
    bench.deliver(plan)
    assert bench.status(plan) == "expired"
    assert len(bench.lines(plan, "output.jsonl")) == 23
    check_accounts(bench, plan)


def test_a_batch_that_only_has_to_be_delivered_does_not_expire(bench):
    plan = bench.admit_now(15)
    bench.run(plan, ScriptedEngine())
    bench.let_expire(plan)

    assert bench.end_overdue() == {}
    bench.deliver(plan)
    bench.end_overdue()

    assert bench.status(plan) == "completed"


def test_a_run_over_a_delivered_batch_does_not_expire_it(bench):
    plan = bench.admit_now(15)
    bench.finish(plan)
    bench.folder.journal_path(plan.batch_id, 1).unlink()
    bench.let_expire(plan)

    bench.run(plan, ScriptedEngine(), run_id="run-2")

    assert bench.folder.early_end(plan.batch_id).read() is None
    assert bench.status(plan) == "completed"


def test_the_run_that_a_person_terminated_cancels_its_batch(bench):
    plan = bench.admit_now(15)

    bench.end_overdue(terminated="run-7")

    assert bench.history(plan) == [("cancelling", "run-7")]
    assert "terminated" in bench.folder.early_end(plan.batch_id).read().reason


# --- recovery -------------------------------------------------------------------------------------


def recovered(bench):
    """Remove the store and rebuild it."""
    bench.folder.duckdb.unlink(missing_ok=True)
    return recover(folder=bench.folder, problem="lost", clock=time.time)


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_lost_store_is_rebuilt_with_batches_that_ended_early(bench, end):
    plan = bench.admit_now(35)
    bench.run(plan, ScriptedEngine(), numbers=[0])
    if end == "cancelled":
        bench.cancel(plan)
    else:
        bench.let_expire(plan)
        bench.end_overdue()
    bench.deliver(plan)
    times = bench.store.batch(plan.batch_id).times
    files = [bench.lines(plan, name) for name in FILES]
    dead_letters = bench.store.failures(plan.batch_id)

    recovery = recovered(bench)

    assert recovery.complete
    assert bench.status(plan) == end
    assert bench.store.batch(plan.batch_id).times.keys() == times.keys()
    assert [bench.lines(plan, name) for name in FILES] == files
    assert bench.store.failures(plan.batch_id) == dead_letters


@pytest.mark.parametrize("lost", ["journal", "input"])
def test_delivered_files_that_have_more_than_the_journals_are_kept_by_a_recovery(bench, lost):
    plan = bench.admit_now(30)
    bench.run_until_stuck(plan, StickingEngine(answers=12), lambda: bench.cancel(plan))
    bench.deliver(plan)
    before = {name: bench.lines(plan, name) for name in FILES}
    if lost == "journal":
        bench.folder.journal_path(plan.batch_id, 0).unlink()
    else:
        bench.folder.input_path(plan.batch_id).unlink()

    recovery = recovered(bench)

    assert not recovery.complete
    (problem,) = recovery.batches[0].problems
    for name in FILES:
        kept = name.replace(".jsonl", ".before-recovery.jsonl")
        assert kept in problem
        assert bench.lines(plan, kept) == before[name]
    assert bench.status(plan) == "cancelled"
    check_accounts(bench, plan)


def test_the_journal_of_another_batch_is_not_committed_by_a_recovery(bench):
    plan, other = bench.admit_now(10), bench.admit_now(11)
    bench.run(plan, ScriptedEngine())
    bench.run(other, ScriptedEngine(), run_id="run-2")
    journals = [bench.folder.journal_path(each.batch_id, 0) for each in (plan, other)]
    journals[0].write_bytes(journals[1].read_bytes())

    problems = {batch.batch_id: batch.problems for batch in recovered(bench).batches}

    assert "is the journal of" in problems[plan.batch_id][0]
    assert bench.store.batch(plan.batch_id).chunks_committed == 0
    assert not problems[other.batch_id]


def test_a_batch_whose_store_is_lost_while_it_is_being_cancelled_is_still_being_cancelled(bench):
    plan = bench.admit_now(35)
    bench.run(plan, ScriptedEngine(), numbers=[0])
    bench.cancel(plan)

    recovered(bench)

    assert bench.status(plan) == "cancelling"
    bench.deliver(plan)
    assert bench.status(plan) == "cancelled"
