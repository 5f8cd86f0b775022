"""The command line on a data folder of its own."""

from pathlib import Path

import pytest

from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration_tests.support.command_line import CommandLine


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """The folder does not exist until a command makes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("BATCH_ENGINE", "simulated")
    monkeypatch.setenv("BATCH_MODEL_ALIASES", '{"*": "simulated-model"}')
    monkeypatch.setenv("COLUMNS", "200")
    return CommandLine(DataFolder(tmp_path / "data"))
