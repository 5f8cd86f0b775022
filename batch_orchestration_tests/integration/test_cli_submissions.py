"""Submissions on the command line: one name for a file that became several batches."""

import time
from types import SimpleNamespace

import pytest

from batch_orchestration.domain.batches import BatchStatus
from batch_orchestration.services.close_out import close_out
from batch_orchestration.services.submission_status import submission_status
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.operations import open_replays
from batch_orchestration_tests.builders import NOW, make_input
from batch_orchestration_tests.command_line import CommandLine
from batch_orchestration_tests.letter_bench import refusing
from batch_orchestration_tests.submission_bench import SubmissionBench


@pytest.fixture
def bench(tmp_path):
    return SubmissionBench(tmp_path / "data")


@pytest.fixture
def cli(bench, monkeypatch):
    monkeypatch.setenv("BATCH_DATA_DIR", str(bench.folder.root))
    return CommandLine(DataFolder(bench.folder.root))


@pytest.fixture
def submission(bench):
    """Sixty requests: the first part delivered, the second admitted, the third waiting."""
    submission = bench.split("people.jsonl", make_input(60), meta=b'{"priority": 3}')
    first, _ = bench.admit_parts(max_unfinished=2)
    bench.answer(first, refusing(7))
    bench.deliver(first.batch_id)
    return submission


def finish(bench, submission):
    bench.admit_parts()
    for part in submission.parts[1:]:
        bench.answer(bench.folder.read_plan(part), refusing(30))
        bench.deliver(part)


def test_the_board_sums_a_submission_up_above_its_parts(cli, bench, submission):
    bench.admit_file("other.jsonl", make_input(3))

    rows = [line.split() for line in cli.run("status").stdout.splitlines() if "-" in line]

    ids = [row[0] for row in rows]
    sid = submission.submission_id
    place = ids.index(sid)
    assert ids[place : place + 4] == [sid, *submission.parts]
    whole = cli.run("status").stdout
    assert "25/60" in whole
    assert "validating: waiting for room" in whole
    board = cli.json("status")
    assert {batch["id"] for batch in board["data"]} > set(submission.parts[:2])
    [shown] = board["submissions"]
    assert (shown["id"], shown["object"], shown["status"]) == (sid, "submission", "in_progress")
    assert shown["request_counts"] == {"total": 60, "completed": 24, "failed": 1}
    assert shown["parts"] == list(submission.parts)
    assert shown["endpoint"] == "/v1/chat/completions"
    of_part = next(batch for batch in board["data"] if batch["id"] == submission.parts[0])
    assert (of_part["submission"], of_part["part"], of_part["parts"]) == (sid, 1, 3)
    other = next(batch for batch in board["data"] if batch["id"].startswith("other-"))
    assert not {"submission", "part", "parts"} & other.keys()


def test_one_submission_is_shown_in_full(cli, bench, submission):
    sid = submission.submission_id

    shown = cli.json("status", sid)

    assert [part["id"] for part in shown["parts"]] == list(submission.parts)
    statuses = [part["status"] for part in shown["parts"]]
    assert statuses == ["completed", "in_progress", "validating"]
    assert shown["output_file"] is None
    text = cli.run("status", sid).stdout
    assert "60: 24 answered, 1 failed, 35 pending" in text
    assert all(part in text for part in submission.parts)
    assert cli.json("status", submission.parts[2])["status"] == "validating"


def test_a_delivered_submission_is_completed_with_its_files(cli, bench, submission):
    finish(bench, submission)
    sid = submission.submission_id

    shown = cli.json("status", sid)

    assert shown["status"] == "completed"
    assert shown["output_file"] == str(bench.folder.outbox_path(sid) / "output.jsonl")
    assert shown["completed_at"] == int(NOW + 60)


def test_watching_ends_when_the_last_part_has(cli, bench, submission):
    sid = submission.submission_id
    slept = 0

    def sleep(seconds: float) -> None:
        nonlocal slept
        slept += 1
        if slept == 2:
            finish(bench, submission)

    result = cli.run("watch", sid, sleep=sleep, clock=lambda: NOW + 10 * slept)

    assert "25/60" in result.stdout
    assert "60/60" in result.stdout
    assert f"{sid}/output.jsonl" in result.stdout.replace("\n", "")


def test_submitting_with_wait_waits_for_the_whole_submission(cli, bench, tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH_MAX_REQUESTS_PER_BATCH", "25")
    (tmp_path / "people.jsonl").write_bytes(make_input(60))

    def sleep(seconds: float) -> None:
        for verdict in cli.admit_inbox():
            submission = bench.folder.read_submission(verdict.submission)
            bench.settings = settings_of(bench, submission)
            bench.finish(submission)

    result = cli.run("submit", "--wait", tmp_path / "people.jsonl", sleep=sleep)

    assert "60/60" in result.stdout
    assert "output.jsonl" in result.stdout
    again = cli.json("submit", tmp_path / "people.jsonl")
    assert again["already_admitted"]
    assert again["batch_id"] == bench.folder.submission_ids()[0]


def settings_of(bench, submission):
    """Answer with the settings that the parts were planned with."""
    plan = bench.folder.read_waiting_part(submission.parts[0])
    return type(bench.settings)(
        requests_per_chunk=10, max_line_bytes=2**21, answer_settings=plan.settings
    )


def test_failures_of_a_submission_are_those_of_all_its_parts(cli, bench, submission):
    finish(bench, submission)
    sid = submission.submission_id

    failures = cli.json("failures", sid)

    assert [(row["line"], row["custom_id"]) for row in failures] == [
        (8, "request-7"),
        (31, "request-30"),
    ]
    assert len(cli.json("failures", sid, "--limit", "1")) == 1
    assert "1 more" in cli.run("failures", sid, "--limit", "1").stdout


def test_a_replay_of_a_submission_is_asked_for_of_each_part_with_failures(cli, bench, submission):
    finish(bench, submission)
    sid = submission.submission_id

    assert cli.json("replay", sid, "--limit", 1)["batches"] == [submission.parts[0]]
    said = cli.run("replay", sid).stdout

    assert f"1 requests wait for the engine, as replay 1 of {submission.parts[1]}." in said
    asked = [(submission.parts[0], 1), (submission.parts[1], 1)]
    assert sorted(open_replays(bench.folder)) == asked
    refused = cli.run("replay", sid, exit_code=1).stderr
    assert "the parts have no dead letter that is meant; 2 are being replayed" in refused


def test_failures_of_all_parts_are_discarded_at_once_and_written_as_one_file(
    cli, bench, submission, tmp_path
):
    finish(bench, submission)
    sid, again = submission.submission_id, tmp_path / "again.jsonl"

    written = cli.json("failures", sid, "--as-input", again)
    some = cli.json("failures", sid, "--as-input", tmp_path / "one.jsonl", "--limit", 1)
    discarded = cli.run("discard", sid, "--reason", "not needed").stdout

    lines = make_input(60).splitlines(keepends=True)
    assert again.read_bytes() == lines[7] + lines[30]
    assert (written["requests"], some["requests"]) == (2, 1)
    assert f"2 failed requests of {sid} are discarded" in discarded
    assert {row["state"] for row in cli.json("failures", sid, "--state", "discarded")} == {
        "discarded"
    }
    assert "no dead letter" in cli.run("discard", sid, "--reason", "x", exit_code=1).stderr


def test_a_submission_is_cancelled_and_resumed_by_its_name(cli, bench, submission):
    sid = submission.submission_id

    said = cli.run("cancel", sid, "--reason", "wrong file")
    told = cli.json("cancel", sid)

    assert "2 of 3 parts are being cancelled" in said.stdout
    assert f"batch {submission.parts[0]} is completed" in said.stderr
    assert list(told["parts"]) == list(submission.parts[1:])
    assert all(part["earlier"] for part in told["parts"].values())
    assert "nothing to resume" in cli.run("resume", sid, exit_code=1).stderr
    for part in submission.parts[1:]:
        list(close_out(part, folder=bench.folder, store=bench.store, run_id="r", clock=time.time))
        bench.deliver(part)
    watched = cli.run("watch", sid, exit_code=1).stderr
    assert "wrong file" in watched
    assert f"resume {sid}" in watched
    resumed = cli.run("resume", sid)
    assert "2 of 3 parts go on" in resumed.stdout
    statuses = [str(bench.store.batch(part).status) for part in submission.parts]
    assert statuses == ["completed", "in_progress", "in_progress"]


@pytest.mark.parametrize(
    ("parts", "delivered", "whole"),
    [
        ("validating validating", False, "validating"),
        ("in_progress validating", False, "in_progress"),
        ("completed validating", False, "in_progress"),
        ("completed finalizing", False, "finalizing"),
        ("completed completed", False, "finalizing"),
        ("completed cancelling", False, "cancelling"),
        ("cancelled in_progress", True, "in_progress"),
        ("completed completed", True, "completed"),
        ("completed expired", True, "expired"),
        ("expired cancelled", True, "cancelled"),
    ],
)
def test_a_submission_is_as_far_as_its_parts_are(parts, delivered, whole):
    views = [SimpleNamespace(status=BatchStatus(word)) for word in parts.split()]

    assert submission_status(views, delivered=delivered) == whole
