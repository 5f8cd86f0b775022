"""The queue on the command line: pausing it, and the board that shows what waits for what."""

import pytest

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.dispatch.refresh import refresh_queue
from batch_orchestration.queue.pause import read_pause
from batch_orchestration.settings import load_settings
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.workbench import LATER


@pytest.fixture(autouse=True)
def one_batch_at_a_time(monkeypatch):
    monkeypatch.setenv("BATCH_MAX_UNFINISHED_BATCHES", "1")


def tick(cli):
    """What `dispatch_sensor` does for the queue."""
    settings = load_settings()
    inbox = Inbox(cli.folder, settings)
    refresh_queue(folder=cli.folder, store=cli.store, inbox=inbox, settings=settings, now=LATER)


def test_pause_and_resume_say_what_they_did(cli):
    paused = cli.run("pause", "--reason", "new disks")

    assert "batch_orchestration resume" in paused.stdout
    assert read_pause(cli.folder).reason == "new disks"
    refused = cli.run("resume", "--completion-window", "1h", exit_code=2)
    assert "without BATCH" in refused.stderr
    assert read_pause(cli.folder) is not None
    assert "The queue continues" in cli.run("resume").stdout
    assert read_pause(cli.folder) is None
    assert "was not paused" in cli.run("resume").stdout
    assert cli.json("resume") == {"was_paused": False}


def test_status_shows_the_queue_with_place_and_reason(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    cli.folder.create()
    (cli.folder.inbox / "alice").mkdir()
    (cli.folder.inbox / "alice/later.jsonl").write_bytes(make_input(2))
    tick(cli)

    queue = cli.json("status")["queue"]["entries"]
    text = cli.run("status").stdout

    assert [entry["id"] for entry in queue] == [plan.batch_id, "alice/later.jsonl"]
    assert queue[1]["reason"] == "queue_full"
    assert "Waits for" in text
    assert "queue_full: 1 batches are unfinished; 1 may be at a time" in text


def test_status_says_that_the_queue_is_paused_before_any_tick_has(cli, tmp_path):
    cli.admit_batch(tmp_path)
    cli.run("pause", "--reason", "new disks")

    assert "paused the queue: new disks" in cli.run("status").stdout
    assert cli.json("status")["queue"]["paused"]["reason"] == "new disks"


def test_a_live_board_shows_itself_once_where_there_is_no_terminal(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)

    assert plan.batch_id in cli.run("status", "--live").stdout
    assert "watch BATCH" in cli.run("status", "--live", plan.batch_id, exit_code=2).stderr
