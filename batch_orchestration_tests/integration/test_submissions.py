"""Submissions: a file that was split is answered in parts and delivered as one."""

import threading

import msgspec
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from batch_orchestration.domain.batches import BatchStatus
from batch_orchestration.domain.dead_letters import Selection
from batch_orchestration.domain.errors import AccountingError, OutboxUnwritable
from batch_orchestration.services.dead_letters import as_input, request_replay
from batch_orchestration.services.outbox import write_lines
from batch_orchestration.services.parts import waiting_parts
from batch_orchestration.services.recovery import recover
from batch_orchestration.services.replaying import run_replay
from batch_orchestration_tests.builders import NOW, make_input, make_line
from batch_orchestration_tests.letter_bench import refusing
from batch_orchestration_tests.scripted_engine import ScriptedEngine
from batch_orchestration_tests.submission_bench import SubmissionBench, awkward_input
from batch_orchestration_tests.workbench import make_feeding

FILES = ("output.jsonl", "errors.jsonl")


@pytest.fixture
def bench(tmp_path):
    return SubmissionBench(tmp_path)


def numbers(rows):
    return [int(row["custom_id"].removeprefix("request-")) for row in rows]


def whole_files(bench, submission):
    folder = bench.folder.outbox_path(submission.submission_id)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def test_two_thousand_awkward_lines_come_back_in_their_order(tmp_path):
    """Byte order mark, CRLF, blank lines and repeats fall on the borders of parts, too."""
    bench = SubmissionBench(tmp_path, max_requests_per_batch=500, requests_per_chunk=100)
    submission = bench.split("people.jsonl", awkward_input(2000))

    reports = bench.finish(submission)

    assert [report.submission is None for report in reports] == [True, True, True, False]
    faulty = [n for n in range(2000) if n % 17 in (3, 5)]
    outputs = bench.delivered(submission.submission_id, "output.jsonl")
    errors = bench.delivered(submission.submission_id, "errors.jsonl")
    assert numbers(outputs) == [n for n in range(2000) if n not in faulty]
    codes = ["invalid_json" if n % 17 == 3 else "duplicate_custom_id" for n in faulty]
    assert [row["error"]["code"] for row in errors] == codes
    parts = [bench.delivered(part, "output.jsonl") for part in submission.parts]
    assert outputs == [row for rows in parts for row in rows], "lines are those of the parts"
    report = whole_files(bench, submission)["report.md"].decode()
    assert "2,000, in 4 parts" in report
    assert all(f"| {part} | completed | 500 |" in report for part in submission.parts)
    assert reports[-1].submission.text == report
    assert (reports[-1].submission.completed, reports[-1].submission.failed) == (
        len(outputs),
        len(errors),
    )


@hypothesis_settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    blanks=st.lists(st.integers(0, 3), min_size=4, max_size=30),
    per_chunk=st.integers(1, 6),
    per_part=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
)
def test_whatever_the_borders_and_the_order_of_ending_the_output_is_in_input_order(
    tmp_path_factory, blanks, per_chunk, per_part, order
):
    bench = SubmissionBench(
        tmp_path_factory.mktemp("data"),
        max_requests_per_batch=min(per_part, len(blanks) - 1),
        requests_per_chunk=per_chunk,
    )
    content = b"".join(make_line(n) + b" \r\n" * blank for n, blank in enumerate(blanks))
    submission = bench.split("a.jsonl", content)
    plans = bench.admit_parts()
    order.shuffle(plans)

    for plan in plans:
        bench.answer(plan)
        bench.deliver(plan.batch_id)

    outputs = bench.delivered(submission.submission_id, "output.jsonl")
    assert numbers(outputs) == list(range(len(blanks)))
    assert bench.delivered(submission.submission_id, "errors.jsonl") == []


def test_nothing_of_a_submission_is_delivered_before_its_last_part_ends(bench):
    submission = bench.split("people.jsonl", make_input(60))
    first, second, _ = bench.admit_parts()
    for plan in (second, first):
        bench.answer(plan)
        assert bench.deliver(plan.batch_id).submission is None

    assert not bench.folder.outbox_path(submission.submission_id).exists()
    assert bench.store.batch(first.batch_id).status is BatchStatus.COMPLETED


def test_a_part_that_still_waits_is_waited_for(bench):
    submission = bench.split("people.jsonl", make_input(30))
    (first,) = bench.admit_parts(max_unfinished=1)
    bench.answer(first)

    assert bench.deliver(first.batch_id).submission is None
    bench.finish(submission)

    outputs = bench.delivered(submission.submission_id, "output.jsonl")
    assert numbers(outputs) == list(range(30))


def test_two_parts_that_end_at_the_same_moment_do_not_both_leave_it_to_the_other(bench):
    submission = bench.split("people.jsonl", make_input(50))
    plans = bench.admit_parts()
    for plan in plans:
        bench.answer(plan)
    found = []

    def deliver(batch_id):
        found.append(bench.deliver(batch_id).submission)

    threads = [threading.Thread(target=deliver, args=[plan.batch_id]) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(report is None for report in found) == [False, True]
    assert numbers(bench.delivered(submission.submission_id, "output.jsonl")) == list(range(50))


def test_answers_of_a_replay_make_the_files_of_the_submission_anew(bench):
    submission = bench.split("people.jsonl", make_input(60))
    plans = bench.admit_parts()
    for plan in plans:
        bench.answer(plan, refusing(7, 30, 31))
        bench.deliver(plan.batch_id)
    sid, part = submission.submission_id, submission.parts[1]
    assert numbers(bench.delivered(sid, "errors.jsonl")) == [7, 30, 31]

    feeding = make_feeding(answer_settings=bench.settings.answer_settings)
    common = {"folder": bench.folder, "store": bench.store}
    request_replay(part, Selection(), actor="tester", at=NOW, **common)
    report = run_replay(part, 1, engine=ScriptedEngine(), run_id="r", feeding=feeding, **common)

    assert report.answered == 2
    assert numbers(bench.delivered(sid, "errors.jsonl")) == [7]
    outputs = numbers(bench.delivered(sid, "output.jsonl"))
    assert outputs == [n for n in range(60) if n != 7]


def test_the_original_lines_of_a_part_are_those_of_the_file(bench, tmp_path):
    content = awkward_input(60)
    submission = bench.split("people.jsonl", content)
    plans = bench.admit_parts()
    bench.answer(plans[1], refusing(*range(60)))
    target = tmp_path / "again.jsonl"

    as_input(
        submission.parts[1:2],
        Selection(),
        target,
        folder=bench.folder,
        store=bench.store,
        include_faulty=True,
    )

    lines = [
        line for line in content.removeprefix(b"\xef\xbb\xbf").splitlines(True) if line.strip()
    ]
    assert target.read_bytes() == b"".join(lines[25:50])


@pytest.mark.parametrize("what", ["taken away", "cut", "edited", "exchanged", "answers changed"])
def test_what_people_do_to_the_files_of_parts_does_not_reach_those_of_the_whole(bench, what):
    submission = bench.split("people.jsonl", make_input(60))
    for plan in bench.admit_parts():
        bench.answer(plan, refusing(3, 30))
    for part in submission.parts[:2]:
        bench.deliver(part)
    output = bench.folder.outbox_path(submission.parts[0]) / "output.jsonl"
    if what == "taken away":
        output.unlink()
    elif what == "cut":
        output.write_bytes(output.read_bytes()[:-5])
    elif what == "edited":
        output.write_bytes(b"{}\n" + output.read_bytes())
    elif what == "exchanged":  # one line changed, one doubled, one dropped: as many as before
        lines = output.read_bytes().splitlines(keepends=True)
        output.write_bytes(b"".join([b"{}\n", *lines[2:], lines[5]]))
    else:
        output.write_bytes(output.read_bytes().replace(b"assistant", b"somebody"))

    bench.deliver(submission.parts[2])

    sid = submission.submission_id
    assert numbers(bench.delivered(sid, "output.jsonl")) == [
        n for n in range(60) if n not in (3, 30)
    ]
    assert numbers(bench.delivered(sid, "errors.jsonl")) == [3, 30]
    assert "somebody" not in str(bench.delivered(sid, "output.jsonl"))


def test_the_files_of_the_whole_are_recounted_before_they_can_be_seen(bench, monkeypatch):
    submission = bench.split("people.jsonl", make_input(30))
    first, second = bench.admit_parts()
    for plan in (first, second):
        bench.answer(plan)
    bench.deliver(first.batch_id)

    def swapped(batch_id, settled, output, errors, tally):
        rows = list(settled)
        write_lines(batch_id, [rows[1], rows[0], *rows[2:]], output, errors, tally)

    with monkeypatch.context() as patch:
        patch.setattr("batch_orchestration.services.submission_assembly.write_lines", swapped)
        with pytest.raises(AccountingError, match=r"request 0 of .*-p1of2 has no line"):
            bench.deliver(second.batch_id)

    assert whole_files(bench, submission) == {}
    bench.deliver(second.batch_id)
    assert set(whole_files(bench, submission)) == {*FILES, "report.md", "report.html"}


def test_a_submission_whose_figures_do_not_add_up_is_not_delivered(bench, monkeypatch):
    submission = bench.split("people.jsonl", make_input(30))
    first, second = bench.admit_parts()
    for plan in (first, second):
        bench.answer(plan)
    bench.deliver(first.batch_id)
    read = type(bench.folder).read_submission
    with monkeypatch.context() as patch:
        patch.setattr(
            type(bench.folder),
            "read_submission",
            lambda folder, sid: msgspec.structs.replace(read(folder, sid), requests=31),
        )
        with pytest.raises(AccountingError, match="31 requests"):
            bench.deliver(second.batch_id)

    assert whole_files(bench, submission) == {}
    assert bench.store.batch(second.batch_id).status is BatchStatus.FINALIZING
    bench.deliver(second.batch_id)
    assert set(whole_files(bench, submission)) == {*FILES, "report.md", "report.html"}


def test_an_outbox_that_cannot_be_written_keeps_the_last_part_unfinished(bench):
    submission = bench.split("people.jsonl", make_input(30))
    first, second = bench.admit_parts()
    for plan in (first, second):
        bench.answer(plan)
    bench.deliver(first.batch_id)
    in_the_way = bench.folder.outbox_path(submission.submission_id)
    in_the_way.write_bytes(b"")

    with pytest.raises(OutboxUnwritable):
        bench.deliver(second.batch_id)

    assert bench.store.batch(second.batch_id).status is BatchStatus.FINALIZING
    in_the_way.unlink()
    bench.deliver(second.batch_id)
    assert set(whole_files(bench, submission)) == {*FILES, "report.md", "report.html"}


def test_a_lost_store_is_made_anew_with_all_parts_and_the_same_files(bench):
    submission = bench.split("people.jsonl", awkward_input(60))
    bench.finish(submission)
    waiting = bench.split("more.jsonl", make_input(70))
    files = whole_files(bench, submission)
    figures = [(r.batch_id, r.completed, r.failed) for r in bench.store.batches()]
    bench.folder.duckdb.unlink()

    recovery = recover(folder=bench.folder, problem="gone", clock=lambda: NOW)

    assert recovery.complete
    records = bench.store.batches()
    assert sorted((r.batch_id, r.completed, r.failed) for r in records) == sorted(figures)
    assert {record.status for record in records} == {BatchStatus.COMPLETED}
    assert whole_files(bench, submission) == files
    assert len(waiting_parts(bench.folder)) == len(waiting.parts) == 3
