"""Delivery of a submission's last part killed between any two changes to the disk.

`crashing_submission` dies by SIGKILL at the n-th change, and tells what the next
delivery made of it.
"""

import json
import subprocess
import sys
from pathlib import Path

FILES = ["errors.jsonl", "output.jsonl", "report.html", "report.md"]


def test_the_next_delivery_makes_the_whole_submission_good(tmp_path):
    program = "batch_orchestration_tests.fault.crashing_submission"
    done = subprocess.run(
        [sys.executable, "-m", program, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    accidents = [json.loads(line) for line in done.stdout.splitlines()]

    assert len(accidents) > 20, "it should have died more often"
    whole = [{path for path in found["seen_at_death"] if "of3" not in path} for found in accidents]
    assert {len(seen) for seen in whole} == {0, 1, 2, 3, 4}, "it died before and after each rename"
    for found in accidents:
        assert found["files"] == FILES, found
        assert found["statuses"] == ["completed"] * 3, found
        answered = [f"request-{n}" for n in range(60) if n not in (7, 55)]
        assert found["output.jsonl"] == answered, found
        assert found["errors.jsonl"] == ["request-7", "request-55"], found
