"""A process that may open few files: its window fits into that, and it waits while it has none."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration_tests.support.raw_server import free_port


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A server that holds every request for a while, so that the window fills."""
    port = free_port()
    control = tmp_path / "control.json"
    control.write_text('{"latency_seconds": 1.0}')
    command = [sys.executable, "-m", "batch_orchestration.engines.simulated", "--port", str(port)]
    command += ["--max-num-seqs", "2000", "--control", str(control), "--model", "demo-model"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    yield port
    server.kill()
    server.wait()


def run_limited(folder: Path, *numbers: int) -> tuple[dict[str, Any], str]:
    module = "batch_orchestration_tests.fault.limited_run"
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder), *map(str, numbers)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    ("soft", "hard", "requests", "per_chunk"),
    [(256, 1024, 1200, 100), (256, 256, 400, 100), (64, 128, 40, 1)],
)
def test_a_window_wider_than_the_limit_on_open_files_is_narrowed_and_every_request_answered(
    tmp_path: Path, port: int, soft: int, hard: int, requests: int, per_chunk: int
) -> None:
    result, _ = run_limited(tmp_path / "data", requests, per_chunk, soft, hard, port)

    assert result["limit"] == hard
    assert result["indices"] == list(range(requests))
    assert result["completed"] == result["attempts"] == requests


def test_a_run_without_a_descriptor_left_waits_and_loses_nothing(tmp_path: Path) -> None:
    result, said = run_limited(tmp_path / "data", 200, 10, 256, 256, 0)

    assert result["stolen"] > 100
    assert result["indices"] == list(range(200))
    assert result["attempts"] == 200
    assert "Too many open files" in said
