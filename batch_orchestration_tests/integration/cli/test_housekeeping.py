"""`housekeeping` on the command line, with Dagster's instance and without."""

import shutil
from pathlib import Path

import pytest

from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration_tests.support.builders import believe_the_clock
from batch_orchestration_tests.support.command_line import CommandLine

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """With an old log; the command is started in an empty folder."""
    monkeypatch.setenv("BATCH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = DataFolder(tmp_path / "data")
    folder.create()
    believe_the_clock(folder)
    (folder.logs / "runs").mkdir()
    (folder.logs / "runs/old.log").write_bytes(b"12345")
    return CommandLine(folder)


def in_a_year() -> float:
    return Path(__file__).stat().st_mtime + 400 * 86_400


def test_a_dry_run_lists_what_would_go_with_bytes(cli: CommandLine) -> None:
    said = cli.run("housekeeping", "--dry-run", "--part", "logs", clock=in_a_year).stdout
    told = cli.json("housekeeping", "--dry-run", "--part", "logs", clock=in_a_year)

    assert "logs/runs/old.log  5 bytes" in said
    assert told["removals"] == {"logs": [{"subject": "logs/runs/old.log", "size_bytes": 5}]}
    assert (cli.folder.logs / "runs/old.log").exists()


def test_it_removes_what_is_old_and_keeps_what_is_not(cli: CommandLine) -> None:
    cli.run("housekeeping", "--part", "logs")
    assert (cli.folder.logs / "runs/old.log").exists()

    cli.run("housekeeping", "--part", "logs", clock=in_a_year)
    assert not (cli.folder.logs / "runs/old.log").exists()


def test_an_unknown_part_is_named_with_those_there_are(cli: CommandLine) -> None:
    said = cli.run("housekeeping", "--part", "everything", exit_code=2).stderr

    assert "no part 'everything'; there are journals, samples" in said


def test_without_an_instance_the_other_parts_are_cleaned_and_it_says_what_is_missing(
    cli: CommandLine,
) -> None:
    result = cli.run("housekeeping", clock=in_a_year, exit_code=1)

    assert "there is no dagster.yaml here" in result.stdout
    assert not (cli.folder.logs / "runs/old.log").exists()


def test_where_dagster_yaml_lies_its_instance_is_cleaned_too(cli: CommandLine) -> None:
    shutil.copy(REPOSITORY / "dagster.yaml", Path.cwd())

    told = cli.json("housekeeping", "--dry-run")

    parts = [result["part"] for result in told["results"]]
    assert parts[-3:] == ["partitions", "runs", "ticks"]
    assert all(result["problem"] is None for result in told["results"])
