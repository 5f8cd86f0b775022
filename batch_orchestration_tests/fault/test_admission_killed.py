"""Admission killed between any two changes to the disk, then asked again: nothing lost or doubled.

`crashing_admission` dies by SIGKILL at the n-th change, and tells what a second process made of it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def accidents(scenario: str, folder: Path, *, stride: int) -> list[dict]:
    program = "batch_orchestration_tests.support.crashing_admission"
    done = subprocess.run(
        [sys.executable, "-m", program, scenario, str(folder), str(stride)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 20 / stride, "it should have died more often"
    return found


@pytest.mark.parametrize(
    ("scenario", "ending", "stride", "source"),
    [
        ("admitted", "", 4, "inbox"),
        ("folder", "", 9, "alice"),
        ("gzip", ".gz", 11, "inbox"),
    ],
)
def test_a_file_becomes_one_batch_with_its_options_and_its_failures(
    tmp_path, scenario, ending, stride, source
):
    for found in accidents(scenario, tmp_path, stride=stride):
        [batch] = found["batches"]
        assert found["planned"] == [batch], found
        assert f"batches/{batch}/input.jsonl{ending}" in found["copies"], found
        assert len(found["copies"]) == 1, found
        assert found["sidecars"] == [f"batches/{batch}/input.jsonl.meta.json"], found
        assert (found["priorities"], found["failures"]) == ([7], [[15]]), found
        assert found["sources"] == [source], found
        assert found["verdicts"] == ["Admitted"], found
        assert found["claims"] == [], found


@pytest.mark.parametrize(("scenario", "ending"), [("rejected", ""), ("rejected_gzip", ".gz")])
def test_a_useless_file_is_rejected_once_with_its_reasons(tmp_path, scenario, ending):
    name = f"a b.jsonl{ending}"

    for found in accidents(scenario, tmp_path, stride=7):
        assert found["copies"] == [f"inbox/rejected/{name}"], found
        assert found["sidecars"] == [f"inbox/rejected/{name}.meta.json"], found
        assert found["errors"] == [f"{name}.errors.json"], found
        assert (found["batches"], found["claims"]) == ([], []), found
        assert found["verdicts"] == ["Rejected"], found


def test_a_duplicate_is_kept_beside_the_first(tmp_path):
    for found in accidents("duplicate", tmp_path, stride=9):
        [batch] = found["batches"]
        kept = f"batches/{batch}/duplicates/a b.jsonl"
        assert found["copies"] == [kept, f"batches/{batch}/input.jsonl"], found
        assert f"{kept}.meta.json" in found["sidecars"], found
        assert found["verdicts"] == ["Admitted", "AlreadyAdmitted"], found
        assert found["claims"] == [], found


def test_a_file_without_room_is_back_in_its_folder_once_with_its_survey(tmp_path):
    for found in accidents("held", tmp_path, stride=7):
        assert found["copies"] == ["inbox/alice/a b.jsonl"], found
        assert "inbox/alice/a b.jsonl.meta.json" in found["sidecars"], found
        assert len(found["scans"]) == 1, found
        assert (len(found["batches"]), found["claims"]) == (1, []), found
        assert found["verdicts"] == ["Admitted", "Queued"], found
