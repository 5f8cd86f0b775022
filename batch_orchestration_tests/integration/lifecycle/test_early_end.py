"""Batches that end early: cancelled by people, expired by the clock."""

import time
from pathlib import Path

import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import (
    AccountingError,
    BatchNotFound,
    IllegalTransition,
    JournalInUse,
)
from batch_orchestration.delivery.assembly import OutboxFiles
from batch_orchestration.delivery.recount import recount
from batch_orchestration.files.journal import Journal
from batch_orchestration.lifecycle.cancellation import cancel
from batch_orchestration.lifecycle.close_out import fail_unanswered
from batch_orchestration.operations.recovery import recover
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import make_provenance
from batch_orchestration_tests.support.children import child, next_line
from batch_orchestration_tests.support.closing_bench import ClosingBench, StickingEngine
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine

HOLD_STORE = """
    import sys, duckdb
    connection = duckdb.connect(sys.argv[1])
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def bench(tmp_path: Path) -> ClosingBench:
    return ClosingBench(tmp_path)


def assert_all_accounted(bench: ClosingBench, plan) -> None:
    """Each request is in exactly one file, and the counts of the store are those of the files."""
    counts = recount(plan, OutboxFiles(bench.folder.outbox_path(plan.batch_id)))
    record = bench.store.batch(plan.batch_id)
    assert counts.problem is None
    assert (counts.completed, counts.failed) == (record.completed, record.failed)
    assert record.pending == 0


# --- cancelled in each state ----------------------------------------------------------------------


def test_a_batch_that_waits_to_run_is_cancelled_without_an_engine(bench: ClosingBench) -> None:
    plan = bench.admit_now(25)

    bench.cancel(plan)
    assert bench.status(plan) == "cancelling"
    engine = ScriptedEngine()
    assert bench.run(plan, engine) == []
    report = bench.deliver(plan)

    assert engine.starts == 0
    assert bench.status(plan) == "cancelled"
    assert bench.history(plan) == [("cancelling", "tester"), ("cancelled", "deliver-1")]
    assert (report.totals.completed, report.totals.failed) == (0, 25)
    assert_all_accounted(bench, plan)


def test_a_running_batch_lets_go_of_its_requests_within_seconds(bench: ClosingBench) -> None:
    plan, engine = bench.admit_now(60), StickingEngine(answers=23)

    commits, seconds = bench.run_until_stuck(plan, engine, lambda: bench.cancel(plan))

    assert seconds < 5
    assert engine.aborted == engine.stuck == 8
    assert engine.in_flight == 0
    assert [commit.report.number for commit in commits] == [0, 1]
    assert bench.status(plan) == "cancelling"
    states = bench.journals(plan)
    assert sum(len(state.settled) for state in states) == 23
    assert sum(len(state.in_flight) for state in states) == 8
    assert not any(state.suspects or state.failed_attempts for state in states)

    bench.deliver(plan)

    assert bench.status(plan) == "cancelled"
    assert len(bench.lines(plan, "output.jsonl")) == 23
    assert_all_accounted(bench, plan)


def test_what_was_not_asked_has_a_line_of_openais_shape(bench: ClosingBench) -> None:
    plan = bench.admit_now(3)
    bench.cancel(plan)

    bench.deliver(plan)

    line = bench.lines(plan, "errors.jsonl")[1]
    assert line["custom_id"] == "request-1"
    assert line["response"] is None
    assert line["error"].keys() == {"code", "message"}
    assert line["error"]["code"] == "batch_cancelled"


def test_a_report_says_who_ended_the_batch_and_why(bench: ClosingBench) -> None:
    plan = bench.admit_now(15)
    bench.run(plan, ScriptedEngine(), numbers=[0])
    bench.cancel(plan, reason="wrong | prompt")

    text = bench.deliver(plan).text

    assert "**Cancelled** by tester" in text
    assert "wrong \\| prompt" in text
    assert "5 requests were left without an answer" in text
    assert f"resume {plan.batch_id}" in text
    assert bench.deliver(plan).text == text


def test_cancelling_twice_keeps_the_first_decision(bench: ClosingBench) -> None:
    plan = bench.admit_now(5)

    first = bench.cancel(plan, reason="first")
    second = bench.cancel(plan, reason="second")
    bench.deliver(plan)
    third = bench.cancel(plan, reason="third")

    assert (first.earlier, second.earlier, third.earlier) == (False, True, True)
    assert first.early_end == second.early_end == third.early_end
    assert (second.over, third.over) == (False, True)
    assert bench.history(plan) == [("cancelling", "tester"), ("cancelled", "deliver-1")]


def test_a_batch_with_an_outcome_for_every_request_cannot_be_cancelled(bench: ClosingBench) -> None:
    plan = bench.admit_now(15)
    bench.run(plan, ScriptedEngine())

    with pytest.raises(IllegalTransition, match="an outcome for every request"):
        bench.cancel(plan)
    at, batch_id = time.time(), plan.batch_id
    bench.store.set_status(batch_id, BatchStatus.FINALIZING, at=at, actor="r", reason="")
    with pytest.raises(IllegalTransition, match="an outcome for every request"):
        bench.cancel(plan)
    bench.deliver(plan)
    with pytest.raises(IllegalTransition, match="is completed"):
        bench.cancel(plan)

    assert bench.status(plan) == "completed"
    assert bench.folder.early_end(plan.batch_id).read() is None


def test_an_expired_batch_cannot_be_cancelled(bench: ClosingBench) -> None:
    plan = bench.admit_now(5, window="1s", at=time.time() - 5)
    bench.look()

    with pytest.raises(IllegalTransition, match="has expired, what is answered"):
        bench.cancel(plan)
    bench.deliver(plan)
    with pytest.raises(IllegalTransition, match="is expired"):
        bench.cancel(plan)


def test_a_batch_that_the_store_does_not_know_yet_is_cancelled_when_it_does(
    bench: ClosingBench,
) -> None:
    """Between plan and record of an admission."""
    plan = bench.admit_now(5)
    bench.folder.duckdb.unlink()

    bench.cancel(plan)
    bench.store.add_batch(plan, at=time.time())
    early_ends = bench.look()
    bench.deliver(plan)

    assert early_ends.keys() == {plan.batch_id}
    assert bench.status(plan) == "cancelled"


def test_what_there_is_not_cannot_be_cancelled(bench: ClosingBench) -> None:
    with pytest.raises(BatchNotFound):
        cancel(
            "nothing-00000000", folder=bench.folder, store=bench.store, actor="", reason="", at=0
        )


def test_a_locked_store_delays_the_status_but_not_the_decision(bench: ClosingBench) -> None:
    plan = bench.admit_now(5)
    hasty = Store(bench.folder.duckdb, deadline_seconds=0.2)

    with child(HOLD_STORE, bench.folder.duckdb) as holder:
        next_line(holder)
        cancel(
            plan.batch_id,
            folder=bench.folder,
            store=hasty,
            actor="tester",
            reason="",
            at=time.time(),
        )
        assert bench.folder.early_end(plan.batch_id).read() is not None

    assert bench.status(plan) == "in_progress"
    bench.look()
    assert bench.status(plan) == "cancelling"


def test_a_decision_that_came_while_the_files_were_written_is_void(bench: ClosingBench) -> None:
    """The one way is a store that is locked: nobody can see then how far the batch is."""
    plan = bench.admit_now(5)
    bench.run(plan, ScriptedEngine())
    at, batch_id = time.time(), plan.batch_id
    bench.store.set_status(batch_id, BatchStatus.FINALIZING, at=at, actor="r", reason="")
    with child(HOLD_STORE, bench.folder.duckdb) as holder:
        next_line(holder)
        hasty = Store(bench.folder.duckdb, deadline_seconds=0.2)
        cancel(batch_id, folder=bench.folder, store=hasty, actor="x", reason="", at=at)

    assert bench.look() == {}
    bench.deliver(plan)

    assert bench.status(plan) == "completed"
    assert bench.folder.early_end(batch_id).read() is None


# --- how a batch is closed out --------------------------------------------------------------------


def test_a_batch_that_does_not_end_early_is_not_closed_out(bench: ClosingBench) -> None:
    plan = bench.admit_now(15)

    with pytest.raises(AccountingError):
        bench.deliver(plan)

    assert bench.store.chunk_reports(plan.batch_id) == {}


def test_nothing_is_closed_out_while_a_run_is_still_at_work(bench: ClosingBench) -> None:
    plan = bench.admit_now(25)
    bench.cancel(plan)
    path = bench.folder.journal_path(plan.batch_id, 2)
    journal = Journal.open(
        path, batch_id=plan.batch_id, number=2, provenance=make_provenance(), at=time.time()
    )

    with journal, pytest.raises(JournalInUse):
        list(
            fail_unanswered(
                plan.batch_id,
                folder=bench.folder,
                store=bench.store,
                run_id="d",
                clock=time.time,
                patience_seconds=0.5,
            )
        )

    assert bench.store.chunk_reports(plan.batch_id) == {}


def test_a_store_that_stays_locked_does_not_hold_up_the_end_of_the_run(bench: ClosingBench) -> None:
    plan, engine = bench.admit_now(60), StickingEngine(answers=23)
    bench.store = Store(bench.folder.duckdb, deadline_seconds=0.5)

    with child(HOLD_STORE, bench.folder.duckdb) as holder:
        next_line(holder)
        commits, seconds = bench.run_until_stuck(plan, engine, lambda: bench.cancel(plan))

    assert commits == []
    assert seconds < 10
    bench.deliver(plan)
    assert len(bench.lines(plan, "output.jsonl")) == 23
    assert bench.status(plan) == "cancelled"


# --- expiry ---------------------------------------------------------------------------------------


def test_a_batch_whose_window_is_over_is_expired_by_the_next_look(bench: ClosingBench) -> None:
    plan = bench.admit_now(25, window="1h", at=time.time() - 3601)
    in_time = bench.admit_now(24, window="1h", at=time.time() - 3000)

    early_ends = bench.look()
    bench.deliver(plan)

    assert early_ends.keys() == {plan.batch_id}
    assert bench.status(in_time) == "in_progress"
    assert bench.status(plan) == "expired"
    assert bench.history(plan) == [("finalizing", "sensor"), ("expired", "deliver-1")]
    errors = bench.lines(plan, "errors.jsonl")
    assert {line["error"]["code"] for line in errors} == {"batch_expired"}
    assert len(errors) == 25
    assert_all_accounted(bench, plan)


def test_a_run_notices_by_itself_that_the_window_is_over(bench: ClosingBench) -> None:
    plan, engine = bench.admit_now(60, window="2s"), StickingEngine(answers=23)

    began = time.monotonic()
    commits = bench.run(plan, engine)
    seconds = time.monotonic() - began

    assert seconds < 60
    assert [commit.report.number for commit in commits] == [0, 1]
    early_end = bench.folder.early_end(plan.batch_id).read()
    assert (early_end.status, early_end.actor) == ("expired", "run-1")
    bench.deliver(plan)
    assert bench.status(plan) == "expired"
    assert len(bench.lines(plan, "output.jsonl")) == 23
    assert_all_accounted(bench, plan)


def test_a_batch_that_only_has_to_be_delivered_does_not_expire(bench: ClosingBench) -> None:
    plan = bench.admit_now(15)
    bench.run(plan, ScriptedEngine())
    bench.let_expire(plan)

    assert bench.look() == {}
    bench.deliver(plan)
    bench.look()

    assert bench.status(plan) == "completed"


def test_materializing_a_delivered_batch_again_later_does_not_expire_it(
    bench: ClosingBench,
) -> None:
    plan = bench.admit_now(15)
    bench.run(plan, ScriptedEngine())
    bench.deliver(plan)
    bench.folder.journal_path(plan.batch_id, 1).unlink()
    bench.let_expire(plan)

    bench.run(plan, ScriptedEngine(), run_id="run-2")

    assert bench.folder.early_end(plan.batch_id).read() is None
    assert bench.status(plan) == "completed"


def test_the_run_that_a_person_terminated_cancels_its_batch(bench: ClosingBench) -> None:
    plan = bench.admit_now(15)

    bench.look(terminated="run-7")

    assert bench.history(plan) == [("cancelling", "run-7")]
    assert "terminated" in bench.folder.early_end(plan.batch_id).read().reason


# --- recovery -------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_lost_store_is_made_anew_with_batches_that_ended_early(
    bench: ClosingBench, end: str
) -> None:
    plan = bench.admit_now(35)
    bench.run(plan, ScriptedEngine(), numbers=[0])
    if end == "cancelled":
        bench.cancel(plan)
    else:
        bench.let_expire(plan)
        bench.look()
    bench.deliver(plan)
    status, times = bench.status(plan), bench.store.batch(plan.batch_id).times
    files = [bench.lines(plan, name) for name in ("output.jsonl", "errors.jsonl")]
    letters = bench.store.failures(plan.batch_id)
    bench.folder.duckdb.unlink()

    recovery = recover(folder=bench.folder, problem="lost", clock=time.time)

    assert recovery.complete
    assert bench.status(plan) == status == end
    assert bench.store.batch(plan.batch_id).times.keys() == times.keys()
    assert [bench.lines(plan, name) for name in ("output.jsonl", "errors.jsonl")] == files
    assert bench.store.failures(plan.batch_id) == letters


@pytest.mark.parametrize("lost", ["journal", "input"])
def test_delivered_files_that_have_more_than_the_journals_are_kept_by_a_recovery(
    bench: ClosingBench, lost: str
) -> None:
    plan = bench.admit_now(30)
    bench.run_until_stuck(plan, StickingEngine(answers=12), lambda: bench.cancel(plan))
    bench.deliver(plan)
    names = ("output.jsonl", "errors.jsonl")
    delivered = {name: bench.lines(plan, name) for name in names}
    bench.folder.duckdb.unlink()
    if lost == "journal":
        bench.folder.journal_path(plan.batch_id, 0).unlink()
    else:
        bench.folder.input_path(plan.batch_id).unlink()

    recovery = recover(folder=bench.folder, problem="lost", clock=time.time)

    assert not recovery.complete
    (problem,) = recovery.batches[0].problems
    for name in names:
        kept = name.replace(".jsonl", ".before-recovery.jsonl")
        assert kept in problem
        assert bench.lines(plan, kept) == delivered[name]
    assert bench.status(plan) == "cancelled"
    assert_all_accounted(bench, plan)


def test_the_journal_of_another_batch_is_not_committed_by_a_recovery(bench: ClosingBench) -> None:
    plan, other = bench.admit_now(10), bench.admit_now(11)
    bench.run(plan, ScriptedEngine())
    bench.run(other, ScriptedEngine(), run_id="run-2")
    journals = [bench.folder.journal_path(each.batch_id, 0) for each in (plan, other)]
    journals[0].write_bytes(journals[1].read_bytes())
    bench.folder.duckdb.unlink()

    recovery = recover(folder=bench.folder, problem="lost", clock=time.time)

    problems = {batch.batch_id: batch.problems for batch in recovery.batches}
    assert "is the journal of" in problems[plan.batch_id][0]
    assert bench.store.batch(plan.batch_id).chunks_committed == 0
    assert not problems[other.batch_id]


def test_a_batch_lost_while_it_was_being_cancelled_goes_on_being_cancelled(
    bench: ClosingBench,
) -> None:
    plan = bench.admit_now(35)
    bench.run(plan, ScriptedEngine(), numbers=[0])
    bench.cancel(plan)
    bench.folder.duckdb.unlink()

    recover(folder=bench.folder, problem="lost", clock=time.time)

    assert bench.status(plan) == "cancelling"
    bench.deliver(plan)
    assert bench.status(plan) == "cancelled"
