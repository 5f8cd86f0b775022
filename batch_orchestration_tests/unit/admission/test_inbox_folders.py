"""Sub-folders of the inbox say who submits and how urgent it is, and nothing is lost on the way."""

import json
import os
import time
from pathlib import Path

import pytest

from batch_orchestration.admission.claims import ClaimFolder
from batch_orchestration.admission.inbox import origin_in
from batch_orchestration.admission.reading.lines import BatchFileReading
from batch_orchestration.admission.results import Admitted, AlreadyAdmitted
from batch_orchestration.core.batches import Origin
from batch_orchestration.core.errors import FileStillChanging
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.workbench import LATER, Workbench


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path)


@pytest.mark.parametrize(
    ("name", "meta", "source", "priority"),
    [
        ("a.jsonl", None, "inbox", 0),
        ("high/a.jsonl", None, "inbox", 10),
        ("alice/a.jsonl", None, "alice", 0),
        ("alice/low/a.jsonl", None, "alice", -10),
        ("alice/low/a.jsonl", b'{"metadata": {"k": "v"}}', "alice", -10),
        ("alice/high/a.jsonl", b'{"priority": 0}', "alice", 0),
        ("alice/high/a.jsonl", b'{"user": "bob", "priority": 3}', "bob", 3),
        ("a.jsonl", b'{"user": "bob"}', "bob", 0),
    ],
)
def test_the_folder_says_who_and_how_urgent_unless_the_side_car_does(
    bench, name, meta, source, priority
):
    plan = bench.plan_of(name, make_input(2), meta=meta)

    assert (plan.source, plan.options.source, plan.options.priority) == (source, source, priority)
    record = bench.store.batch(plan.batch_id)
    assert (record.source, record.options.priority) == (source, priority)


def test_a_claim_remembers_where_and_when_its_file_arrived(bench):
    arrived_at = bench.drop("alice/high/a.jsonl", b"content").stat().st_ctime
    time.sleep(0.05)

    [claim] = bench.inbox.claim_ready(now=LATER)

    expected = Origin(folder="alice/high", source="alice", priority=10, arrived_at=arrived_at)
    assert claim.origin == bench.inbox.claim(claim.claim_id).origin == expected
    assert json.loads((claim.path.parent / "claim.json").read_bytes())["source"] == "alice"


def test_claim_json_is_there_before_the_file_is_moved(bench, monkeypatch):
    """Else a file released after a crash would go to the wrong folder."""
    bench.drop("alice/a.jsonl", b"content")

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr("pathlib.Path.rename", die)
    with pytest.raises(Killed):
        bench.inbox.claim_ready(now=LATER)

    [folder] = [p for p in bench.folder.claims.iterdir() if not p.name.startswith(".")]
    assert ClaimFolder(bench.folder, folder.name).origin().folder == "alice"
    assert (bench.folder.inbox / "alice/a.jsonl").exists()


def test_files_of_higher_priority_are_claimed_first_then_those_that_came_first(bench):
    for name in ("low/a.jsonl", "b.jsonl", "alice/c.jsonl", "high/d.jsonl", "bob/high/e.jsonl"):
        bench.drop(name, b"content")
        time.sleep(0.01)

    claims = bench.inbox.claim_ready(now=LATER)

    assert [claim.path.name[0] for claim in claims] == ["d", "e", "b", "c", "a"]


def test_what_changes_while_it_is_read_goes_back_to_its_folder_with_its_side_car(
    bench, monkeypatch
):
    claim = bench.claim("alice/high/a.jsonl", make_input(2), meta=b'{"user": "bob"}')
    read = BatchFileReading.read

    def written_meanwhile(reading, file):
        with claim.path.open("ab") as same:
            same.write(b"more")
        return read(reading, file)

    monkeypatch.setattr(BatchFileReading, "read", written_meanwhile)
    with pytest.raises(FileStillChanging, match="alice/high"):
        bench.admit(claim)

    assert bench.files_of(bench.folder.inbox) == {
        "alice/high/a.jsonl",
        "alice/high/a.jsonl.meta.json",
    }
    assert [p for p in bench.folder.claims.iterdir() if not p.name.startswith(".")] == []


def test_a_side_car_that_a_crash_parted_from_its_file_goes_back_to_its_folder(bench):
    claim = bench.claim("alice/a.jsonl", b"content", meta=b"{}")
    claim.path.rename(bench.folder.inbox / "alice/a.jsonl")

    [again] = bench.inbox.claim_ready(now=LATER)

    assert again.claim_id != claim.claim_id
    assert again.sidecar is not None
    assert not claim.path.parent.exists()


def test_a_folder_that_its_author_removed_meanwhile_is_made_again(bench):
    claim = bench.claim("alice/a.jsonl", b"content", meta=b"{}")
    claim.path.unlink()
    (bench.folder.inbox / "alice").rmdir()

    bench.inbox.claim_ready(now=LATER)

    assert bench.files_of(bench.folder.inbox) == {"alice/a.jsonl.meta.json"}


def test_deeper_folders_rejected_links_and_hidden_ones_are_left_alone(bench, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.jsonl").write_bytes(b"content")
    (bench.folder.inbox / "link").symlink_to(outside)
    for name in (
        *("one/two/three/a.jsonl", "rejected/a.jsonl", "alice/rejected/a.jsonl"),
        *(".hidden/a.jsonl", "folder.jsonl/a.jsonl", "copy.part/a.jsonl"),
    ):
        bench.drop(name, b"content")

    assert bench.inbox.claim_ready(now=LATER) == []
    reasons = {waiting.name: waiting.reason for waiting in bench.inbox.waiting(now=LATER)}
    assert reasons.keys() == {
        "link", "one/two/three", "alice/rejected", "folder.jsonl", "copy.part"
    }  # fmt: skip
    assert "symbolic link" in reasons["link"]
    assert "2 levels" in reasons["one/two/three"]


def test_a_folder_whose_name_is_not_utf8_is_told_and_its_files_stay(bench):
    folder = Path(os.fsdecode(os.fsencode(bench.folder.inbox) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"content")

    assert bench.inbox.claim_ready(now=LATER) == []
    [waiting] = bench.inbox.waiting(now=LATER)
    assert (waiting.name, "UTF-8" in waiting.reason) == ("caf?/a.jsonl", True)


def test_the_same_content_from_another_source_is_another_batch(bench):
    first = bench.admit_file("alice/a.jsonl", make_input(2))
    second = bench.admit_file("bob/a.jsonl", make_input(2))
    third = bench.admit_file("alice/b.jsonl", make_input(2))

    assert isinstance(first, Admitted)
    assert isinstance(second, Admitted)
    assert isinstance(third, AlreadyAdmitted)
    assert third.batch_id == first.batch_id != second.batch_id


def test_a_claim_of_an_older_version_counts_as_dropped_into_the_inbox(bench):
    claim = bench.claim("a.jsonl", make_input(2))
    (claim.path.parent / "claim.json").unlink()

    verdict = bench.admit(bench.inbox.claim(claim.claim_id))

    assert isinstance(verdict, Admitted)
    assert bench.folder.read_plan(verdict.batch_id).source == "inbox"


PRIORITIES = {"high": 10, "low": -10}


@pytest.mark.parametrize(
    ("folders", "source", "priority"),
    [
        ((), "inbox", 0),
        (("high",), "inbox", 10),
        (("HIGH",), "inbox", 10),
        (("alice",), "alice", 0),
        (("alice", "low"), "alice", -10),
        (("low", "alice"), "alice", -10),
        (("alice", "reports"), "alice", 0),
        (("low", "high"), "inbox", 10),
        (("x" * 100,), "x" * 64, 0),
    ],
)
def test_folders_name_the_source_and_the_priority(folders, source, priority):
    origin = origin_in(folders, PRIORITIES, arrived_at=7.0)

    assert origin == Origin(
        folder="/".join(folders), source=source, priority=priority, arrived_at=7.0
    )
