"""Early ends of batches whose files are not what they were: a person can end them all the same."""

import time

import pytest

from batch_orchestration.core.errors import FileDamaged, StorageError
from batch_orchestration.core.lifecycle import deadline
from batch_orchestration.lifecycle.cancellation import end_overdue
from batch_orchestration.lifecycle.close_out import fail_unanswered
from batch_orchestration_tests.support.builders import write_plan
from batch_orchestration_tests.support.scripted_engine import StickingEngine
from batch_orchestration_tests.support.workbench import Workbench


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


def appended(path):
    with path.open("ab") as file:
        file.write(b'{"custom_id": "late", "method": "POST", "url": "/v1/chat/completions"}\n')


def cut_in_the_third_chunk(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:25]))


def edited_in_the_second_chunk(path):
    path.write_bytes(path.read_bytes().replace(b"request-13", b"request-xx", 1))


def a_line_put_in_front(path):
    path.write_bytes(b'{"custom_id": "first"}\n' + path.read_bytes())


def a_folder_instead(path):
    path.unlink()
    path.mkdir()


#: What happens to the kept input, and in which chunks it takes the lines of what has no outcome.
CHANGES = {
    "appended": (appended, ()),
    "cut": (cut_in_the_third_chunk, (2,)),
    "edited": (edited_in_the_second_chunk, (1,)),
    "shifted": (a_line_put_in_front, (1, 2)),
    "emptied": (lambda path: path.write_bytes(b""), (1, 2)),
    "removed": (lambda path: path.unlink(), (1, 2)),
    "a folder": (a_folder_instead, (1, 2)),
}


def answered_in_part(bench):
    """Admit 30 requests; 12 are answered when the run is stopped."""
    plan = bench.admit_now(30)
    engine = StickingEngine(answers=12)
    bench.run_until_stuck(plan, engine, lambda: bench.cancel(plan))
    return plan


@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_whose_kept_input_has_changed_is_delivered_when_it_is_cancelled(bench, change):
    change_it, lost = CHANGES[change]
    plan = answered_in_part(bench)
    change_it(bench.folder.input_path(plan.batch_id))

    report = bench.deliver(plan)

    assert bench.status(plan) == "cancelled"
    assert (report.totals.completed, report.totals.failed) == (12, 18)
    output, errors = bench.lines(plan, "output.jsonl"), bench.lines(plan, "errors.jsonl")
    lines = [*output, *errors]
    answered = {line["custom_id"] for line in output}
    known = {line["custom_id"] for line in lines if line["custom_id"] is not None}
    whole = {f"request-{index}" for index in range(30) if index // 10 not in lost}
    assert len(answered - {None}) == 12
    assert known == whole | answered
    assert len({line["id"] for line in lines}) == 30


@pytest.mark.parametrize("name", ["early-end.json", "resumed.json"])
@pytest.mark.parametrize("content", [b"", b'{"status": "canc', b"null"])
def test_a_person_who_cancels_takes_the_place_of_a_decision_that_cannot_be_read(
    bench, name, content
):
    plan = bench.admit_now(30)
    path = bench.folder.plan_path(plan.batch_id).with_name(name)
    path.write_bytes(content)

    bench.cancel(plan)
    bench.deliver(plan)

    assert bench.status(plan) == "cancelled"
    (aside,) = path.parent.glob(f"{name}.damaged-*")
    assert aside.read_bytes() == content


@pytest.mark.parametrize("name", ["early-end.json", "resumed.json"])
def test_nothing_is_decided_about_a_batch_whose_decision_cannot_be_read(bench, name):
    plan = bench.admit_now(30)
    bench.folder.plan_path(plan.batch_id).with_name(name).write_bytes(b"{")
    other = bench.admit_now(20)
    bench.cancel(other)

    assert set(bench.end_overdue()) == {other.batch_id}
    assert bench.status(plan) == "in_progress"


def test_a_batch_whose_decision_to_cancel_is_removed_goes_on_being_cancelled(bench):
    plan = bench.admit_now(30)
    bench.cancel(plan)
    assert bench.status(plan) == "cancelling"
    bench.folder.early_end(plan.batch_id).path.unlink()

    assert set(bench.end_overdue()) == {plan.batch_id}

    report = bench.deliver(plan)
    assert (bench.status(plan), report.totals.failed) == ("cancelled", 30)


def test_a_batch_without_a_readable_plan_is_cancelled_and_expires_by_what_the_store_knows(bench):
    cancelled, expired = bench.admit_now(30), bench.admit_now(20)
    for plan in (cancelled, expired):
        bench.folder.plan_path(plan.batch_id).write_bytes(b"")
    bench.cancel(cancelled)
    late = deadline(bench.store.batch(expired.batch_id)) + 1

    early_ends = end_overdue(
        bench.store.batches(),
        folder=bench.folder,
        store=bench.store,
        terminated={},
        actor="sensor",
        now=late,
    )

    assert {name: str(c.status) for name, c in early_ends.items()} == {
        cancelled.batch_id: "cancelled",
        expired.batch_id: "expired",
    }
    assert bench.status(cancelled) == "cancelling"
    with pytest.raises(FileDamaged, match=r"plan\.json is empty"):
        bench.deliver(cancelled)
    write_plan(bench.folder, cancelled)
    bench.deliver(cancelled)
    assert bench.status(cancelled) == "cancelled"


def test_a_chunk_that_cannot_be_closed_out_keeps_no_other_from_it(bench):
    plan = bench.admit_now(30)
    journal = bench.folder.journal_path(plan.batch_id, 1)
    journal.mkdir(parents=True)
    bench.cancel(plan)
    reports = fail_unanswered(
        plan.batch_id, folder=bench.folder, store=bench.store, run_id="r", clock=time.time
    )
    assert [next(reports).number, next(reports).number] == [0, 2]
    with pytest.raises(StorageError, match=str(journal)):
        next(reports)

    assert sorted(bench.store.chunk_reports(plan.batch_id)) == [0, 2]
    journal.rmdir()
    bench.deliver(plan)
    assert bench.status(plan) == "cancelled"


def test_a_run_goes_on_while_the_decision_about_its_batch_cannot_be_read(bench):
    plan = bench.admit_now(30)
    bench.folder.early_end(plan.batch_id).path.write_bytes(b"")

    commits = bench.run(plan, StickingEngine(answers=30))

    assert [commit.report.number for commit in commits] == [0, 1, 2]
