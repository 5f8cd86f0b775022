"""The commands about failed requests and about a damaged store, as people use them."""

import json

import pytest

from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.dead_letters.replaying import run_replay
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.store.operations import open_replays
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.letter_bench import refusing
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench, make_policy


@pytest.fixture
def batch_id(cli, tmp_path):
    """A batch of five requests, of which 1 and 3 have failed."""
    plan = cli.admit_batch(tmp_path, requests=5)
    bench = Workbench(cli.folder.root)
    bench.run(plan, refusing(1, 3), answer_settings=plan.settings)
    cli.assemble(plan)
    return plan.batch_id


def answer(cli, batch_id, number):
    """Do what Dagster does about a replay."""
    return run_replay(
        batch_id,
        number,
        RunContext(
            engine=ScriptedEngine(),
            folder=cli.folder,
            store=cli.store,
            run_id="r",
            policy=make_policy(answer_settings=cli.folder.read_plan(batch_id).settings),
        ),
        clock=lambda: NOW,
    )


def test_a_replay_is_asked_for_and_left_to_dagster(cli, batch_id):
    text = cli.run("replay", batch_id, "--custom-id", "request-1", "--max-tokens", 9).stdout

    assert "1 requests wait for the engine, as replay 1" in text
    assert open_replays(cli.folder) == [(batch_id, 1)]
    states = {f["custom_id"]: f["state"] for f in cli.json("failures", batch_id)}
    assert states == {"request-1": "replaying", "request-3": "dead"}
    answer(cli, batch_id, 1)
    assert [f["custom_id"] for f in cli.json("failures", batch_id)] == ["request-3"]
    resolved = cli.json("failures", batch_id, "--state", "resolved")
    assert [f["custom_id"] for f in resolved] == ["request-1"]


def test_a_replay_can_be_waited_for(cli, batch_id):
    ended = []

    def sleep(seconds):
        ended.append(answer(cli, batch_id, 1))

    text = cli.run("replay", batch_id, "--wait", sleep=sleep).stdout

    assert len(ended) == 1
    assert "5 answered, 0 failed." in text


def test_fields_of_the_body_are_given_as_json(cli, batch_id):
    cli.run("replay", batch_id, "--set", "temperature=0.5", "--set", 'stop=["x"]')

    sql = "SELECT reason FROM dead_letter_events WHERE request_index = 1 AND state = 'replaying'"
    ((overrides,),) = cli.store.query(sql)[1]
    assert json.loads(overrides) == {"temperature": 0.5, "stop": ["x"]}
    assert "not JSON" in cli.run("replay", batch_id, "--set", "a=b", exit_code=2).stderr


def test_nothing_to_replay_ends_with_1_and_the_reason(cli, batch_id):
    result = cli.run("replay", batch_id, "--code", "timeout", exit_code=1)

    assert "matches the selection" in result.stderr
    assert cli.run("replay", batch_id, "--code", "nonsense", exit_code=2).stderr


def test_failures_are_written_as_a_batch_file(cli, batch_id, tmp_path):
    text = cli.run("failures", batch_id, "--as-input", tmp_path / "again.jsonl").stdout

    assert "2 requests are in" in text
    lines = (tmp_path / "again.jsonl").read_bytes().splitlines()
    kept = cli.folder.input_path(batch_id).read_bytes().splitlines()
    assert lines == [kept[1], kept[3]]
    again = cli.run("failures", batch_id, "--as-input", tmp_path / "again.jsonl", exit_code=1)
    assert "exists" in again.stderr


def test_failures_are_filtered_by_code_state_and_id(cli, batch_id):
    cli.run("discard", batch_id, "--custom-id", "request-3", "--reason", "obsolete")

    discarded = cli.json("failures", batch_id, "--state", "discarded")

    assert [f["discard_reason"] for f in discarded] == ["obsolete"]
    assert len(cli.json("failures", batch_id, "--code", "engine_refused")) == 2
    assert cli.json("failures", batch_id, "--code", "timeout") == []
    assert "obsolete" not in cli.run("failures", batch_id, "--state", "dead").stdout
    assert cli.json("failures", batch_id, "--custom-id", "request-1")[0]["state"] == "dead"


def test_a_discard_needs_its_reason(cli, batch_id):
    assert "--reason" in cli.run("discard", batch_id, exit_code=2).stderr
    assert "needs a reason" in cli.run("discard", batch_id, "--reason", " ", exit_code=1).stderr

    text = cli.run("discard", batch_id, "--reason", "obsolete").stdout

    assert "2 failed requests" in text
    assert cli.store.dead_letters(batch_id, Selection()) == []


def test_a_sound_store_needs_no_recovery(cli, batch_id):
    before = cli.folder.duckdb.read_bytes()

    assert "nothing to do" in cli.run("recover").stdout

    assert cli.folder.duckdb.read_bytes() == before


def test_a_damaged_store_is_recovered_by_the_command_that_its_error_names(cli, batch_id):
    cli.folder.duckdb.write_bytes(b"garbage" * 10_000)
    assert "python -m batch_orchestration recover" in cli.run("status", exit_code=1).stderr

    text = cli.run("recover").stdout

    assert "batch.duckdb.damaged-" in text
    assert f"{batch_id}: completed, 1 of 1 chunks committed (3 answered, 2 failed)" in text
    assert cli.json("status", batch_id)["request_counts"]["completed"] == 3


def test_what_could_not_be_recovered_ends_with_1(cli, batch_id):
    cli.folder.duckdb.unlink()
    cli.folder.plan_path(batch_id).write_text("not a plan")

    result = cli.run("recover", exit_code=1)

    assert "could not be rebuilt" in result.stdout
    assert "plan.json" in result.stdout
