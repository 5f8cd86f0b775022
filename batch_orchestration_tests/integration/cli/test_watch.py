"""Watching a batch: what is shown on the way, when it ends, and with which exit code."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from batch_orchestration.cli.watching import display, follow
from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.status.views import view_batch, view_batches
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import NOW, make_input

PATHS = {
    BatchStatus.CANCELLED: (BatchStatus.CANCELLING, BatchStatus.CANCELLED),
    BatchStatus.EXPIRED: (BatchStatus.FINALIZING, BatchStatus.EXPIRED),
}

HOLD_STORE = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


class Timeline:
    """A clock whose sleeps let things happen."""

    def __init__(self, *events):
        self.now = NOW
        self._events = list(events)

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        if self._events:
            self._events.pop(0)()


def follow_on(timeline, cli, plan, show):
    return follow(
        plan.batch_id,
        folder=cli.folder,
        store=cli.store,
        show=show,
        clock=timeline.clock,
        sleep=timeline.sleep,
    )


def nothing():
    pass


def test_following_shows_each_step_and_ends_with_the_batch(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    timeline = Timeline(
        lambda: cli.progress(plan, updated_at=NOW + 1, completed=1, failed=0),
        lambda: cli.progress(plan, updated_at=NOW + 2, completed=2, failed=0),
        lambda: cli.settle(plan),
        lambda: cli.assemble(plan),
        *[nothing] * 5,
    )
    seen = []

    view = follow_on(timeline, cli, plan, seen.append)

    assert view.status is BatchStatus.COMPLETED
    assert [shown.done for shown in seen][:3] == [0, 1, 2]
    assert seen[-1].done == 3


def test_following_asks_the_store_now_and_then_only(cli, tmp_path):
    """Each look at it shuts out its writers."""
    plan = cli.admit_batch(tmp_path)
    timeline = Timeline(*[nothing] * 39, lambda: (cli.settle(plan), cli.assemble(plan)))
    asked = []

    class Counting(Store):
        def batch(self, batch_id):
            asked.append(timeline.now)
            return super().batch(batch_id)

    cli.store = Counting(cli.folder.duckdb)

    follow_on(timeline, cli, plan, lambda view: None)

    watching = [at for at in asked if at < NOW + 40]
    assert len(watching) <= 11


def test_without_a_terminal_there_is_a_line_every_few_seconds(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    cli.progress(plan, updated_at=NOW + 20)
    timeline = Timeline(*[nothing] * 19, lambda: (cli.settle(plan), cli.assemble(plan)))
    text = io.StringIO()

    with display(Console(file=text, width=200), clock=timeline.clock) as show:
        follow_on(timeline, cli, plan, show)

    lines = text.getvalue().splitlines()
    assert 4 <= len(lines) <= 6
    assert "in_progress: feeding  2/3  1 failed  1 in flight  0.5 requests/s" in lines[0]
    assert lines[-1].endswith("completed  3/3  0 failed")


def test_on_a_terminal_there_is_a_bar(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    cli.progress(plan, updated_at=NOW)
    view = view_batch(plan.batch_id, folder=cli.folder, store=cli.store, now=NOW)
    text = io.StringIO()
    console = Console(file=text, width=80, force_terminal=True)

    with display(console, clock=lambda: NOW) as show:
        show(view)

    assert "━" in text.getvalue()
    assert "ETA 1 min 3 s" in text.getvalue()


def test_watch_ends_with_0_and_says_where_the_files_are(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    cli.settle(plan)
    cli.assemble(plan)

    text = cli.run("watch", plan.batch_id).stdout
    (line,) = cli.run("watch", plan.batch_id, "--json").stdout.splitlines()

    assert "output.jsonl" in text
    assert "errors.jsonl" in text
    assert json.loads(line)["status"] == "completed"
    assert "no batch" in cli.run("watch", "nothing-00000000", exit_code=1).stderr


@pytest.mark.parametrize("status", [BatchStatus.CANCELLED, BatchStatus.EXPIRED])
def test_watch_ends_with_1_if_the_batch_did_not_complete(cli, tmp_path, status):
    plan = cli.admit_batch(tmp_path)
    for step in PATHS[status]:
        cli.store.set_status(plan.batch_id, step, at=NOW, actor="tester", reason="")

    assert f"ended as {status}" in cli.run("watch", plan.batch_id, exit_code=1).stderr


def test_status_shows_how_a_batch_came_to_where_it_is(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    cli.settle(plan)
    cli.assemble(plan)

    text = cli.run("status", plan.batch_id).stdout
    events = cli.json("status", plan.batch_id)["events"]

    assert "every request has an outcome" in text
    assert [event["to_status"] for event in events] == [
        *("validating", "in_progress", "finalizing", "completed")
    ]
    assert events[-1]["actor"] == "assembly"
    assert events[-1]["reason"] == "3 answered, 0 failed"


def test_submit_and_wait_follows_the_batch_to_its_end(cli, tmp_path):
    (tmp_path / "people.jsonl").write_bytes(make_input(3))

    def work(seconds):
        for verdict in cli.admit_inbox():
            plan = cli.folder.read_plan(verdict.batch_id)
            cli.settle(plan)
            cli.assemble(plan)

    text = cli.run("submit", tmp_path / "people.jsonl", "--wait", sleep=work).stdout

    assert "It becomes batch people-" in text
    assert "completed  3/3" in text


def test_submit_and_wait_ends_with_1_if_the_file_is_rejected(cli, tmp_path):
    (tmp_path / "bad.jsonl").write_text("[1]\n")

    result = cli.run(
        *("submit", tmp_path / "bad.jsonl", "--wait"),
        exit_code=1,
        sleep=lambda seconds: cli.admit_inbox(),
    )

    assert "bad.jsonl: rejected" in result.stderr


# --- while a stranger holds the store -------------------------------------------------------------


@pytest.fixture
def held_store(cli, tmp_path):
    """A batch with progress, and a process that has the DuckDB file open for writing."""
    plan = cli.admit_batch(tmp_path)
    cli.progress(plan)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_STORE, cli.folder.duckdb],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    holder.stdout.readline()
    yield plan, holder
    holder.communicate()


def test_status_works_while_the_store_is_locked_and_names_the_holder(cli, held_store):
    plan, holder = held_store
    store = cli.impatient_store()

    result = cli.run("status", plan.batch_id, store=store)

    assert f"pid {holder.pid}" in result.stderr
    assert "3: 1 answered, 1 failed, 1 pending" in result.stdout
    overview = cli.json("status", store=store)
    assert f"pid {holder.pid}" in overview["store_problem"]
    assert overview["data"][0]["request_counts"]["completed"] == 1


def test_what_needs_the_store_fails_with_the_holders_name(cli, held_store):
    plan, holder = held_store

    for command in (["failures", plan.batch_id], ["query", "SELECT 1"]):
        result = cli.run(*command, exit_code=1, store=cli.impatient_store())
        assert f"pid {holder.pid}" in result.stderr


def test_a_batch_of_a_locked_store_is_taken_for_completed_by_its_output(cli, held_store):
    plan, _ = held_store
    cli.folder.outbox_path(plan.batch_id).mkdir()
    (cli.folder.outbox_path(plan.batch_id) / "output.jsonl").touch()

    (view,) = view_batches(folder=cli.folder, store=cli.impatient_store(), now=NOW)

    assert view.status is BatchStatus.COMPLETED
    assert view.store_problem
