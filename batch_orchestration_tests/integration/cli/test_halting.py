"""What people say and see of a pause: side-car, flag, launchpad, `status`, `resume`."""

from contextlib import closing
from pathlib import Path

import pytest

from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.command_line import CommandLine
from batch_orchestration_tests.support.deployment import Deployment
from batch_orchestration_tests.support.scripted_engine import refusing
from batch_orchestration_tests.support.workbench import Workbench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    bench = Workbench(tmp_path, policy={"max_failure_rate": 0.5})
    monkeypatch.setenv("BATCH_DATA_DIR", str(bench.folder.root))
    monkeypatch.setenv("BATCH_ENGINE", "simulated")
    monkeypatch.setenv("BATCH_SERVED_MODEL_NAME", "demo-model")
    return bench


@pytest.fixture
def cli(bench: Workbench) -> CommandLine:
    return CommandLine(bench.folder)


def test_the_flag_of_submit_and_a_side_car_say_the_same(
    bench: Workbench, cli: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(make_input(3))
    cli.run("submit", tmp_path / "a.jsonl", "--max-failure-rate", "0.125")
    (bench.folder.inbox / "b.jsonl").write_bytes(make_input(4))
    (bench.folder.inbox / "b.jsonl.meta.json").write_text('{"max_failure_rate": 0.125}')

    plans = [bench.folder.read_plan(verdict.batch_id) for verdict in cli.admit_inbox()]

    assert [plan.options.max_failure_rate for plan in plans] == [0.125, 0.125]


@pytest.mark.parametrize("said", ["1.5", "-0.1", '"half"', "1e999", "NaN", "[0.5]", "true"])
def test_a_side_car_with_a_rate_that_is_no_share_is_rejected_and_says_so(
    bench: Workbench, cli: CommandLine, said: str
) -> None:
    (bench.folder.inbox / "a.jsonl").write_bytes(make_input(3))
    (bench.folder.inbox / "a.jsonl.meta.json").write_text(f'{{"max_failure_rate": {said}}}')

    cli.admit_inbox()

    assert (bench.folder.rejected / "a.jsonl").exists()
    [errors] = bench.folder.rejected.glob("*.errors.json")
    assert "max_failure_rate" in errors.read_text() or "meta.json" in errors.read_text()
    assert bench.folder.batch_ids() == []


@pytest.mark.parametrize("said", ["1.5", "-0.1", "nan", "half"])
def test_a_flag_that_is_no_share_submits_nothing(
    bench: Workbench, cli: CommandLine, tmp_path: Path, said: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(make_input(3))

    cli.run("submit", tmp_path / "a.jsonl", "--max-failure-rate", said, exit_code=2)

    assert list(bench.folder.inbox.glob("*.jsonl")) == []


def test_the_launchpad_takes_a_rate(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(make_input(3))
    config = {"path": str(tmp_path / "a.jsonl"), "max_failure_rate": 0.25}
    with closing(Deployment(tmp_path)) as deployment:
        deployment.repository.get_job("submit_batch").execute_in_process(
            instance=deployment.instance,
            run_config={"ops": {"submit_file": {"config": config}}},
        )
        [request] = deployment.requests("inbox_sensor")
        deployment.run(request)
        [batch_id] = deployment.folder.batch_ids()

        assert deployment.folder.read_plan(batch_id).options.max_failure_rate == 0.25


def test_status_says_why_a_batch_is_paused_and_resume_takes_another_rate(
    bench: Workbench, cli: CommandLine
) -> None:
    plan = bench.admit_now(100)
    bench.run(plan, refusing("question"))

    paused = cli.json("status", plan.batch_id)
    text = cli.run("status", plan.batch_id).output
    cli.run("resume", plan.batch_id, "--max-failure-rate", "1")
    bench.run(plan, refusing("question"), run_id="run-2")
    after = cli.json("status", plan.batch_id)

    assert "unknown parameter: 'tempreature'" in paused["paused"]["reason"]
    assert len(paused["paused"]["examples"]) == 3
    assert f"resume {plan.batch_id}" in " ".join(text.split())
    assert "unknown parameter: 'tempreature'" in text
    assert after["paused"] is None
    assert len(bench.settled(plan)) == 100
