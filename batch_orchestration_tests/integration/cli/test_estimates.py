"""Estimates on the command line: of a file, of a batch, and of the last batches."""

from batch_orchestration_tests.support.builders import make_input


def test_a_file_is_estimated_before_anything_is_admitted(cli, tmp_path):
    (tmp_path / "people.jsonl").write_bytes(make_input(30))

    shown = cli.run("validate", tmp_path / "people.jsonl").output
    report = cli.json("validate", tmp_path / "people.jsonl")
    sent = cli.run("submit", tmp_path / "people.jsonl").output

    assert "Expected prompt tokens: " in shown
    assert "by 4 characters a token" in shown
    assert "benchmark_engine" in shown
    assert report["estimate"]["requests"] == 30
    assert report["estimate"]["seconds"] is None
    assert "Expected completion tokens: " in sent
    assert not cli.folder.duckdb.exists()


def test_an_estimate_is_shown_with_its_batch_and_then_among_the_scored_ones(cli, tmp_path):
    assert "No batch with an estimate" in cli.run("estimates").output
    assert cli.json("estimates")["batches"] == []

    plan = cli.admit_batch(tmp_path, requests=12)

    assert "Expected completion tokens" in cli.run("status", plan.batch_id).output
    assert cli.json("status", plan.batch_id)["estimate"]["requests"] == plan.requests

    cli.settle(plan)
    cli.assemble(plan)

    shown, report = cli.run("estimates").output, cli.json("estimates")
    assert plan.batch_id in shown
    assert "1 batches scored." in shown
    (batch,) = report["batches"]
    assert batch["actual_tokens"] == 12 * (7 + 3)
    assert batch["expected_seconds"] is None
    assert report["calibration"]["batches"] == 1
