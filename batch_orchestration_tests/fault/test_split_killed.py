"""Splitting a file killed between any two changes to the disk: one submission, each part once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REQUESTS, PER_PART = 40, 25


# A stride of 1 dies before every single change; it was tried, and takes a minute and a half.
@pytest.mark.parametrize(("ending", "stride"), [("", 3), (".gz", 5)])
def test_a_file_becomes_one_submission_whose_parts_hold_every_request(tmp_path, ending, stride):
    faulty = [n for n in range(REQUESTS) if n % 17 in (3, 5)]
    parts = [range(start, min(start + PER_PART, REQUESTS)) for start in (0, PER_PART)]

    for found in accidents(ending, tmp_path, stride=stride):
        [submission] = found["submissions"]
        place = f"submissions/{submission}/input.jsonl"
        assert found["copies"] == [f"{place}{ending}"], found
        assert found["sidecars"] == [f"{place}.meta.json"], found
        assert found["waiting"] == found["claims"] == [], found
        assert found["planned"] == [f"{submission}-p{number}of2" for number in (1, 2)], found
        assert found["batches"] == found["planned"], found
        assert found["requests"] == [len(part) for part in parts], found
        assert found["priorities"] == [7, 7], found
        assert found["failures"] == [[n - p[0] for n in p if n in faulty] for p in parts], found
        assert found["verdicts"] == ["split"], found


def accidents(ending: str, folder: Path, *, stride: int) -> list[dict]:
    program = "batch_orchestration_tests.fault.crashing_split"
    done = subprocess.run(
        [sys.executable, "-m", program, *([ending] if ending else []), str(folder), str(stride)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 40 / stride, "it should have died more often"
    return found
