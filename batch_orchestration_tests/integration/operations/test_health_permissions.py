"""Health says when others of the machine can look at prompts, answers or keys."""

from pathlib import Path

import pytest

from batch_orchestration.operations.health.checks import permissions
from batch_orchestration.operations.health.report import Level
from batch_orchestration_tests.support.health_bench import HealthBench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HealthBench:
    monkeypatch.chdir(tmp_path)
    return HealthBench(tmp_path)


def test_a_folder_that_others_can_enter_is_closed_at_the_next_start(bench: HealthBench) -> None:
    bench.folder.root.chmod(0o755)
    report = bench.look(checks={"permissions": permissions})
    (found,) = report.findings
    assert found.level is Level.DEGRADED
    assert str(bench.folder.root) in found.reason
    assert found.next_command == f"chmod o-rwx {bench.folder.root}"

    bench.folder.create()

    assert bench.folder.root.stat().st_mode & 0o7777 == 0o2770
    assert bench.look(checks={"permissions": permissions}).level is Level.HEALTHY


@pytest.mark.parametrize(("mode", "level"), [(0o644, Level.DEGRADED), (0o640, Level.HEALTHY)])
def test_an_env_file_that_others_can_read_is_named(
    bench: HealthBench, tmp_path: Path, mode: int, level: Level
) -> None:
    (tmp_path / ".env").write_text("BATCH_API_KEY=s3cret\n")
    (tmp_path / ".env").chmod(mode)

    report = bench.look(checks={"permissions": permissions})

    assert report.level is level
    assert "s3cret" not in str(report)
