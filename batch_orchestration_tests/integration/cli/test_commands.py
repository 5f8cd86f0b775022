"""The command line, in process: what people and programs read, and how it ends."""

import json
import time

import pytest

from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration_tests.support.builders import (
    NOW,
    make_failure,
    make_input,
    make_line,
    make_settled,
)

# --- status ---------------------------------------------------------------------------------------


def test_status_of_nothing_says_what_to_do_and_makes_nothing(cli):
    result = cli.run("status")

    assert "Drop a .jsonl file into its inbox/" in result.stdout
    assert not cli.folder.root.exists()


def test_status_of_a_folder_that_no_daemon_ever_opened_says_what_waits_there(cli, monkeypatch):
    monkeypatch.setenv("BATCH_SETTLE_SECONDS", "0")
    cli.folder.inbox.mkdir(parents=True)
    (cli.folder.inbox / "a.jsonl").write_bytes(make_input(1))

    overview = cli.json("status")
    text = cli.run("status").stdout

    assert overview["unread"]
    assert [row["path"] for row in overview["waiting"]] == [str(cli.folder.inbox / "a.jsonl")]
    assert "complete; no daemon has ever looked at this inbox" in text
    assert "`make dev`" in text
    assert f"BATCH_DATA_DIR={cli.folder.root}" in text.replace("\n", "")


def test_status_of_an_unknown_batch_fails(cli):
    result = cli.run("status", "nothing-00000000", exit_code=1)

    assert "no batch 'nothing-00000000'" in result.stderr
    assert result.stdout == ""


def test_status_lists_what_waits_and_what_was_rejected(cli, tmp_path):
    (tmp_path / "bad.jsonl").write_text("[1, 2]\n")
    cli.run("submit", tmp_path / "bad.jsonl")
    cli.admit_inbox()
    (cli.folder.inbox / "notes.txt").write_text("hello")

    overview = cli.json("status")

    assert overview["waiting"][0]["path"].endswith("notes.txt")
    assert "rename to .jsonl" in overview["waiting"][0]["reason"]
    assert overview["rejected"][0]["file_name"] == "bad.jsonl"
    assert "validate" in overview["rejected"][0]["next_step"]
    text = cli.run("status").stdout
    assert "notes.txt" in text
    assert "bad.jsonl" in text


def test_status_of_a_batch_is_an_openai_batch_object(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    cli.settle(plan, failing=(1,))
    cli.assemble(plan)

    batch = cli.json("status", plan.batch_id)

    assert batch["id"] == plan.batch_id
    assert batch["object"] == "batch"
    assert batch["endpoint"] == "/v1/chat/completions"
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert batch["usage"] == {"input_tokens": 14, "output_tokens": 6, "total_tokens": 20}
    assert batch["completed_at"] == int(NOW + 60)
    assert isinstance(batch["created_at"], int)
    assert batch["cancelled_at"] is None
    assert batch["output_file"] == str(cli.folder.outbox_path(plan.batch_id) / "output.jsonl")
    assert batch["error_file"] == str(cli.folder.outbox_path(plan.batch_id) / "errors.jsonl")
    assert batch["progress"] is None
    openai = pytest.importorskip("openai.types")
    assert openai.Batch.construct(**batch).request_counts.completed == 2


def test_status_counts_uncommitted_outcomes_and_disbelieves_a_silent_run(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    cli.progress(plan)

    batch = cli.json("status", plan.batch_id)

    assert batch["request_counts"] == {"total": 3, "completed": 1, "failed": 1}
    assert batch["progress"]["output_tokens_per_second"] == 140.0
    text = cli.run("status", plan.batch_id).stdout
    assert "in_progress: feeding" in text
    assert "ETA 1 min 3 s" in text

    cli.progress(plan, updated_at=time.time() - 300)

    text = cli.run("status", plan.batch_id).stdout

    assert "its run (pid 4242) has not reported for 5 min" in text
    assert "tokens/s" not in text
    assert cli.json("status", plan.batch_id)["progress"] is None


# --- submit, validate -----------------------------------------------------------------------------


def test_submit_puts_a_copy_into_the_inbox_and_foretells_the_batch(cli, tmp_path):
    (tmp_path / "people.jsonl").write_bytes(make_input(2))

    sent = cli.json("submit", tmp_path / "people.jsonl", "--priority", 7, "--metadata", "a=b=c")

    (verdict,) = cli.admit_inbox()
    assert sent["batch_id"] == verdict.batch_id
    batch = cli.json("status", verdict.batch_id)
    assert batch["priority"] == 7
    assert batch["metadata"] == {"a": "b=c"}


def test_submit_takes_the_side_car_and_lets_flags_win(cli, tmp_path):
    (tmp_path / "people.jsonl").write_bytes(make_input(2))
    side_car = {"priority": 1, "metadata": {"team": "hiring"}}
    (tmp_path / "people.meta.json").write_text(json.dumps(side_car))

    cli.run("submit", tmp_path / "people.jsonl", "--priority", 5)

    (verdict,) = cli.admit_inbox()
    options = cli.folder.read_plan(verdict.batch_id).options
    assert (options.priority, options.metadata) == (5, {"team": "hiring"})


def test_submit_points_to_the_batch_that_it_would_be_again(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)

    again = cli.json("submit", tmp_path / "people.jsonl")

    assert again["already_admitted"] is True
    assert again["batch_id"] == plan.batch_id
    assert list(cli.folder.inbox.glob("*.jsonl")) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["submit", "missing.jsonl"],
        ["submit", "ok.jsonl", "--metadata", "novalue"],
        ["submit", "ok.jsonl", "--priority", "5000"],
        ["submit", "ok.jsonl", "--completion-window", "soon"],
        ["status", "--nonsense"],
        ["failures"],
        ["conquer"],
    ],
)
def test_wrong_usage_ends_with_2(cli, tmp_path, arguments):
    (tmp_path / "ok.jsonl").write_bytes(make_input(1))

    assert cli.run(*arguments, exit_code=2).stderr


def test_submit_refuses_a_file_that_the_inbox_would_ignore(cli, tmp_path):
    (tmp_path / "people.csv").write_text("a,b\n")

    result = cli.run("submit", tmp_path / "people.csv", exit_code=1)

    assert "rename to .jsonl" in result.stderr


def test_validate_lists_every_fault(cli, tmp_path):
    lines = [make_line(0), b"{torn\n", make_line(2, method="GET"), make_line(0)]
    (tmp_path / "mixed.jsonl").write_bytes(b"".join(lines))

    result = cli.run("validate", tmp_path / "mixed.jsonl", exit_code=1)

    for code in ("invalid_json", "invalid_request", "duplicate_custom_id"):
        assert code in result.stdout
    assert "3 of 4 requests would fail unasked" in result.stderr
    report = cli.json("validate", tmp_path / "mixed.jsonl", exit_code=1)
    assert [fault["line"] for fault in report["faults"]] == [2, 3, 4]


def test_validate_is_content_with_a_flawless_file(cli, tmp_path):
    (tmp_path / "good.jsonl").write_bytes(make_input(5))

    assert "5 requests, 0 of them faulty" in cli.run("validate", tmp_path / "good.jsonl").stdout
    assert not cli.folder.root.exists()


# --- failures, query, config ----------------------------------------------------------------------


def test_failures_come_in_input_order_with_their_reasons(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)
    timeout = make_failure(FailureCode.TIMEOUT, status=None, body=None, message="no answer in 5 s")
    settled = [make_settled(0, make_failure()), make_settled(1), make_settled(2, timeout)]
    cli.store.commit_chunk(plan.batch_id, 0, settled, run_id="r", at=NOW, seconds=1.0)

    failures = cli.json("failures", plan.batch_id)

    assert [(f["custom_id"], f["code"], f["status_code"]) for f in failures] == [
        ("request-0", "engine_refused", 400),
        ("request-2", "timeout", None),
    ]
    shown = cli.run("status", plan.batch_id).stdout
    assert "engine_refused 1" in shown
    assert f"python -m batch_orchestration failures {plan.batch_id}" in shown
    text = cli.run("failures", plan.batch_id, "--limit", 1).stdout
    assert "request-0" in text
    assert "request-2" not in text
    assert "1 more: --limit 2 shows all." in text


def test_a_batch_without_failures_says_so(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)

    assert f"No request of {plan.batch_id} has failed" in cli.run("failures", plan.batch_id).stdout
    assert cli.json("failures", plan.batch_id) == []


def test_query_reads_and_cannot_write(cli, tmp_path):
    plan = cli.admit_batch(tmp_path)

    rows = cli.json("query", "SELECT batch_id, requests, created_at FROM batches")

    assert rows[0]["batch_id"] == plan.batch_id
    assert rows[0]["requests"] == 3
    assert plan.batch_id in cli.run("query", "SELECT batch_id FROM batches").stdout
    assert "one SELECT statement" in cli.run("query", "DELETE FROM batches", exit_code=1).stderr


def test_config_says_where_each_value_came_from(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH_IN_FLIGHT", "17")
    monkeypatch.setenv("BATCH_API_KEY", "sk-secret")
    (tmp_path / ".env").write_text("BATCH_MAX_ATTEMPTS=2\n")

    settings = {row["variable"]: row for row in cli.json("config")}

    assert settings["BATCH_IN_FLIGHT"]["value"] == "17"
    assert settings["BATCH_IN_FLIGHT"]["origin"] == "environment"
    assert settings["BATCH_MAX_ATTEMPTS"]["origin"] == ".env"
    assert settings["BATCH_SETTLE_SECONDS"]["origin"] == "default"
    assert all(row["description"] for row in settings.values())
    assert "sk-secret" not in cli.run("config").stdout


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("BATCH_INFLIGHT", "3", "BATCH_INFLIGHT is not a setting; did you mean BATCH_IN_FLIGHT?"),
        ("BATCH_IN_FLIGHT", "0", "BATCH_IN_FLIGHT: Input should be greater than or equal to 1"),
        ("BATCH_MODEL_ALIASES", "{", "BATCH_MODEL_ALIASES: not JSON"),
        ("BATCH_ENGINE", "remote", "BATCH_ENGINE=remote needs BATCH_BASE_URL"),
    ],
)
def test_unusable_settings_end_with_2_and_are_named(cli, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)

    assert message in cli.run("status", exit_code=2).stderr


def test_an_unknown_setting_in_the_env_file_is_refused_too(cli, tmp_path):
    (tmp_path / ".env").write_text("BATCH_INFLIGHT=3\n")

    assert "did you mean BATCH_IN_FLIGHT?" in cli.run("status", exit_code=2).stderr
