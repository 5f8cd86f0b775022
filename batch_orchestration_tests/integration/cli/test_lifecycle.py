"""`cancel` and `resume`, and what the other commands say of a batch that ends early."""

import json
import time

from batch_orchestration.lifecycle.close_out import fail_unanswered


def deliver(cli, plan):
    chunks = fail_unanswered(
        plan.batch_id, folder=cli.folder, store=cli.store, run_id="run-1", clock=time.time
    )
    list(chunks)
    cli.assemble(plan)


def test_cancel_says_what_happens_and_says_so_again(cli, tmp_path):
    batch_id = cli.admit_batch(tmp_path).batch_id

    first = cli.run("cancel", batch_id, "--reason", "wrong file").stdout
    second = cli.run("cancel", batch_id).stdout
    told = cli.json("cancel", batch_id)

    assert "is being cancelled" in first
    assert f"watch {batch_id}" in first
    assert "wrong file" in second
    assert (told["earlier"], told["over"]) == (True, False)
    assert told["early_end"]["reason"] == "wrong file"


def test_cancel_of_a_batch_that_is_over_says_so(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    cli.settle(plan)
    finalizing = cli.run("cancel", plan.batch_id, exit_code=1).stderr
    cli.assemble(plan)
    completed = cli.run("cancel", plan.batch_id, exit_code=1).stderr

    assert "there is nothing to cancel" in finalizing
    assert "is completed" in completed
    assert "no batch" in cli.run("cancel", "nothing-00000000", exit_code=1).stderr


def test_watch_and_status_say_who_cancelled_and_how_to_go_on(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    cli.run("cancel", plan.batch_id, "--reason", "wrong file")
    under_way = cli.run("status", plan.batch_id).stdout
    deliver(cli, plan)

    watched = cli.run("watch", plan.batch_id, exit_code=1)
    shown = cli.run("status", plan.batch_id).stdout
    told = cli.json("status", plan.batch_id)

    assert "answers so far are being delivered" in under_way
    assert "ended as cancelled by" in watched.stderr
    assert "wrong file" in watched.stderr
    assert "0 of 3 requests are answered" in watched.stderr
    assert f"resume {plan.batch_id}" in watched.stderr
    assert "output.jsonl" in watched.stdout
    assert "wrong file" in shown
    assert told["status"] == told["early_end"]["status"] == "cancelled"
    assert [event["to_status"] for event in told["events"]][-2:] == ["cancelling", "cancelled"]
    assert told["expires_at"] == told["created_at"] + 86400


def test_resume_brings_a_batch_back_and_refuses_what_it_cannot(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    assert "nothing to resume" in cli.run("resume", plan.batch_id, exit_code=1).stderr
    cli.run("cancel", plan.batch_id)
    deliver(cli, plan)

    assert (
        "not a duration"
        in cli.run(*("resume", plan.batch_id, "--completion-window", "soon"), exit_code=2).stderr
    )
    said = cli.run("resume", plan.batch_id, "--completion-window", "1h30m").stdout

    assert "continues" in said
    told = cli.json("status", plan.batch_id)
    assert (told["status"], told["early_end"]) == ("in_progress", None)
    assert told["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    assert abs(told["expires_at"] - time.time() - 5400) < 60
    assert json.dumps(told)
