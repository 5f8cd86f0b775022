"""The command line as a process: entry points, exit codes, streams, and how fast it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

from batch_orchestration_tests.support.builders import make_input

REPOSITORY = Path(__file__).resolve().parents[3]
#: What a command must not pay for before it knows what it is to do.
SLOW_MODULES = ("dagster", "vllm", "torch", "transformers", "pandas", "aiohttp")


def run(folder, *arguments):
    kept = {name: text for name, text in os.environ.items() if not name.startswith("BATCH_")}
    return subprocess.run(
        [sys.executable, "-m", "batch_orchestration", *map(str, arguments)],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_command_line_loads_nothing_slow():
    script = (
        "import sys; import batch_orchestration.cli; "
        f"print([name for name in {SLOW_MODULES} if name in sys.modules])"
    )

    loaded = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )

    assert loaded.stdout.strip() == "[]"


def test_done_is_0_and_json_is_all_there_is_on_standard_output(tmp_path):
    ended = run(tmp_path, "status", "--json")

    assert ended.returncode == 0
    assert json.loads(ended.stdout)["data"] == []
    assert ended.stderr == ""


def test_failed_is_1_with_a_sentence_and_no_traceback(tmp_path):
    ended = run(tmp_path, "failures", "nothing-00000000")

    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: no batch 'nothing-00000000'")
    assert "Traceback" not in ended.stderr


def test_wrong_usage_is_2(tmp_path):
    ended = run(tmp_path, "status", "--bogus")

    assert ended.returncode == 2
    assert "Usage: python -m batch_orchestration" in ended.stderr


def test_submit_leaves_a_file_and_says_where(tmp_path):
    (tmp_path / "Grüße an alle.jsonl").write_bytes(make_input(1))

    ended = run(tmp_path, "submit", "Grüße an alle.jsonl", "--json")

    assert ended.returncode == 0
    assert Path(json.loads(ended.stdout)["inbox_file"]).read_bytes() == make_input(1)
