"""Submissions that are cancelled and resumed as a whole: parts at work, ended, and waiting."""

from pathlib import Path

import pytest

from batch_orchestration.domain.batches import BatchStatus
from batch_orchestration.domain.errors import IllegalTransition, StorageError, StoreLocked
from batch_orchestration.services.close_out import close_out
from batch_orchestration.services.closing import close_due
from batch_orchestration.services.parts import register_lost, waiting_parts
from batch_orchestration.services.registration import admission_lock
from batch_orchestration.services.submission_endings import cancel_submission, resume_submission
from batch_orchestration.services.submission_status import view_submission
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.store import Store
from batch_orchestration_tests.builders import make_input
from batch_orchestration_tests.letter_bench import refusing
from batch_orchestration_tests.submission_bench import SubmissionBench, awkward_input


@pytest.fixture
def bench(tmp_path: Path) -> SubmissionBench:
    return SubmissionBench(tmp_path / "data")


def now(submission):
    return submission.created_at + 60


def cancel(bench, submission):
    return cancel_submission(
        submission.submission_id, folder=bench.folder, store=bench.store,
        actor="tester", reason="wrong file", at=now(submission),
    )  # fmt: skip


def resume(bench, submission, *, window=None, at=None):
    return resume_submission(
        submission.submission_id, folder=bench.folder, store=bench.store, actor="tester",
        completion_window=window, at=at or now(submission) + 60,
    )  # fmt: skip


def deliver_all(bench, submission):
    """What the runs of `deliver_batch` do for every part that is not delivered."""
    common = {"folder": bench.folder, "store": bench.store, "run_id": "deliver"}
    for part_id in submission.parts:
        if bench.store.batch(part_id).status is BatchStatus.CANCELLING:
            list(close_out(part_id, clock=lambda: now(submission) + 30, **common))
            bench.deliver(part_id)


def die(*_):
    raise KeyboardInterrupt


def locked(*_):
    raise StoreLocked("held by somebody")


def statuses(bench, submission):
    return [str(bench.store.batch(part).status) for part in submission.parts]


def codes(bench, submission):
    lines = bench.delivered(submission.submission_id, "errors.jsonl")
    return [line["error"]["code"] for line in lines if line["error"]]


def test_parts_at_work_and_parts_that_wait_are_cancelled_and_what_is_answered_is_delivered(bench):
    submission = bench.split("people.jsonl", make_input(90))
    first, second = bench.admit_parts(max_unfinished=2)
    bench.answer(first)
    bench.deliver(first.batch_id)

    done = cancel(bench, submission)

    assert set(done.cancelled) == set(submission.parts[1:])
    assert not any(one.earlier for one in done.cancelled.values())
    assert done.left.keys() == {first.batch_id}
    assert statuses(bench, submission) == ["completed", *["cancelling"] * 3]
    assert waiting_parts(bench.folder) == []
    deliver_all(bench, submission)
    assert statuses(bench, submission) == ["completed", *["cancelled"] * 3]
    sid = submission.submission_id
    assert len(bench.delivered(sid, "output.jsonl")) == 25
    assert codes(bench, submission) == ["batch_cancelled"] * 65
    view = view_submission(sid, folder=bench.folder, store=bench.store, now=now(submission) + 60)
    assert view.whole.status is BatchStatus.CANCELLED
    assert view.whole.closing.reason == "wrong file"
    assert second.batch_id in done.cancelled


def test_a_waiting_part_keeps_the_failures_of_its_faulty_lines(bench):
    submission = bench.split("people.jsonl", awkward_input(60))

    cancel(bench, submission)
    deliver_all(bench, submission)

    found = codes(bench, submission)
    assert len(found) == 60
    assert 60 - submission.faulty == found.count("batch_cancelled")


def test_cancelling_again_changes_nothing_and_an_ended_submission_refuses(bench):
    submission = bench.split("people.jsonl", make_input(60))
    cancel(bench, submission)
    before = [bench.folder.read_closing(part) for part in submission.parts]

    again = cancel(bench, submission)

    assert all(one.earlier and not one.over for one in again.cancelled.values())
    deliver_all(bench, submission)
    assert all(one.over for one in cancel(bench, submission).cancelled.values())
    assert [bench.folder.read_closing(part) for part in submission.parts] == before
    other = bench.split("other.jsonl", make_input(30))
    bench.finish(other)
    with pytest.raises(IllegalTransition, match="nothing to cancel"):
        cancel(bench, other)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_cancellation_that_dies_at_a_part_is_finished_by_doing_it_again(bench, monkeypatch, call):
    """It dies before or after the rename that makes the part a batch; no part ever gets a run."""
    submission = bench.split("people.jsonl", make_input(60))
    rename, calls = Path.rename, 0

    def dying(path, target):
        nonlocal calls
        if path.parent.name != "parts":
            return rename(path, target)
        calls += 1
        if call == 2 * calls - 1:
            raise KeyboardInterrupt
        done = rename(path, target)
        if call == 2 * calls:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            cancel(bench, submission)
    decided = [part for part in submission.parts if _decided(bench.folder, part)]
    assert len(decided) == (call + 1) // 2

    assert set(cancel(bench, submission).cancelled) == set(submission.parts)

    deliver_all(bench, submission)
    assert codes(bench, submission) == ["batch_cancelled"] * 60


def _decided(folder: DataFolder, part_id: str) -> bool:
    places = (folder.closing_path(part_id), folder.waiting_part_path(part_id) / "closing.json")
    return any(place.exists() for place in places)


def test_a_part_whose_cancellation_died_is_closed_by_the_tick_that_finds_room(bench, monkeypatch):
    submission = bench.split("people.jsonl", make_input(60))
    with monkeypatch.context() as patch:
        patch.setattr("batch_orchestration.services.parts.crash_point", die)
        with pytest.raises(KeyboardInterrupt):
            cancel(bench, submission)

    bench.admit_parts(max_unfinished=1)
    due = close_due(
        bench.store.batches(), folder=bench.folder, store=bench.store,
        terminated=lambda batch_id: None, actor="sensor", now=now(submission),
    )  # fmt: skip

    assert list(due) == [submission.parts[0]]
    assert bench.store.batch(submission.parts[0]).status is BatchStatus.CANCELLING


def test_a_locked_store_delays_what_it_knows_but_not_the_decision(bench, monkeypatch):
    submission = bench.split("people.jsonl", make_input(60))
    bench.admit_parts(max_unfinished=1)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_reading", locked)
        patch.setattr(Store, "_writing", locked)
        cancel(bench, submission)

    assert all(bench.folder.read_closing(part) for part in submission.parts)
    assert len(bench.store.batches()) == 1
    register_lost(bench.folder, bench.store, at=now(submission))
    due = close_due(
        bench.store.batches(), folder=bench.folder, store=bench.store,
        terminated=lambda batch_id: None, actor="sensor", now=now(submission),
    )  # fmt: skip
    assert set(due) == set(submission.parts)


def test_while_a_file_is_admitted_the_parts_at_work_are_cancelled_all_the_same(bench, monkeypatch):
    submission = bench.split("people.jsonl", make_input(60))
    bench.admit_parts(max_unfinished=1)
    monkeypatch.setattr("batch_orchestration.services.parts._LOCK_TIMEOUT_SECONDS", 0.1)

    with admission_lock(bench.folder), pytest.raises(StorageError, match="do it again"):
        cancel(bench, submission)

    assert bench.folder.read_closing(submission.parts[0]) is not None
    assert len(waiting_parts(bench.folder)) == 2


def test_a_resumed_submission_asks_the_rest_and_its_files_are_as_if_undisturbed(bench):
    submission = bench.split("people.jsonl", make_input(60))
    (first,) = bench.admit_parts(max_unfinished=1)
    bench.answer(first, refusing(7))
    bench.deliver(first.batch_id)
    cancel(bench, submission)
    with pytest.raises(IllegalTransition, match="completed"):
        resume(bench, submission)
    deliver_all(bench, submission)

    done = resume(bench, submission)

    assert list(done.resumed) == list(submission.parts[1:])
    assert done.left.keys() == {first.batch_id}
    for part in submission.parts[1:]:
        bench.answer(bench.folder.read_plan(part))
        bench.deliver(part)
    sid = submission.submission_id
    assert statuses(bench, submission) == ["completed"] * 3
    outputs = [line["custom_id"] for line in bench.delivered(sid, "output.jsonl")]
    assert outputs == [f"request-{n}" for n in range(60) if n != 7]
    assert len(bench.delivered(sid, "errors.jsonl")) == 1
    with pytest.raises(IllegalTransition, match="nothing to resume"):
        resume(bench, submission)


def test_a_submission_whose_window_is_over_needs_a_new_one(bench):
    submission = bench.split("people.jsonl", make_input(60))
    cancel(bench, submission)
    deliver_all(bench, submission)
    late = submission.created_at + 2 * 86400

    with pytest.raises(IllegalTransition, match="--completion-window"):
        resume(bench, submission, at=late)
    with pytest.raises(ValueError, match="not a duration"):
        resume(bench, submission, at=late, window="soon")
    resume(bench, submission, at=late, window="1h")

    assert {bench.folder.read_resumption(p).deadline for p in submission.parts} == {late + 3600}
