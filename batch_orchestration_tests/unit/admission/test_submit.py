"""Submitting copies a file into the inbox, whole, under a name of its own."""

import json
from pathlib import Path

import msgspec
import pytest

from batch_orchestration.admission.results import Admitted
from batch_orchestration.admission.submit import submit
from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.core.errors import FileRefused
from batch_orchestration_tests.support.builders import make_input
from batch_orchestration_tests.support.workbench import LATER, Workbench

OPTIONS = BatchOptions(priority=5, metadata={"team": "hr"})


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path / "data")


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_bytes(make_input(3))
    return path


def test_a_copy_lies_in_the_inbox_and_the_original_stays(bench, source):
    dropped = submit(source, BatchOptions(), bench.folder)

    assert dropped == bench.folder.inbox / "a.jsonl"
    assert dropped.read_bytes() == source.read_bytes() == make_input(3)
    assert {path.name for path in bench.folder.inbox.iterdir()} == {"rejected", "a.jsonl"}


def test_options_arrive_with_the_file(bench, source):
    submit(source, OPTIONS, bench.folder)

    [claim] = bench.inbox.claim_ready(now=LATER)
    verdict = bench.admit(claim)

    assert isinstance(verdict, Admitted)
    assert bench.folder.read_plan(verdict.batch_id).options == OPTIONS


def test_without_options_the_side_car_beside_the_file_is_taken(bench, source):
    source.with_name("a.meta.json").write_bytes(b'{"priority": 9}')

    dropped = submit(source, None, bench.folder)

    sidecar = json.loads(dropped.with_name("a.jsonl.meta.json").read_text())
    assert sidecar["priority"] == 9


def test_a_faulty_side_car_is_refused_before_anything_is_copied(bench, source):
    source.with_name("a.meta.json").write_bytes(b'{"priority": "high"}')

    with pytest.raises(FileRefused, match="`priority`"):
        submit(source, None, bench.folder)

    assert bench.files_of(bench.folder.inbox) == set()


def test_a_file_of_the_inbox_is_never_overwritten_nor_given_a_strangers_side_car(bench, source):
    bench.drop("a.jsonl", b"first")
    bench.drop("a (2).meta.json", b"of somebody else")

    third = submit(source, OPTIONS, bench.folder)
    fourth = submit(source, BatchOptions(), bench.folder)

    assert (bench.folder.inbox / "a.jsonl").read_bytes() == b"first"
    assert third.name == "a (3).jsonl"
    assert fourth.name == "a (4).jsonl"
    assert bench.files_of(bench.folder.inbox) == {
        "a.jsonl",
        "a (2).meta.json",
        "a (3).jsonl",
        "a (3).jsonl.meta.json",
        "a (4).jsonl",
    }


def test_only_the_last_part_of_a_path_is_a_name(bench, source, monkeypatch):
    deep = source.parent / "deep"
    deep.mkdir()
    monkeypatch.chdir(deep)
    (deep / "..\\..\\b.jsonl").write_bytes(b"content")

    assert submit(Path("../a.jsonl"), None, bench.folder) == bench.folder.inbox / "a.jsonl"
    assert submit(Path("..\\..\\b.jsonl"), None, bench.folder) == bench.folder.inbox / "b.jsonl"


@pytest.mark.parametrize("stem", ["two words", "名前 🎓", "x" * 194, "x" * 249, "é" * 120])
def test_any_name_arrives_with_its_options(bench, tmp_path, stem):
    source = tmp_path / f"{stem}.jsonl"
    source.write_bytes(make_input(1))

    submit(source, OPTIONS, bench.folder)

    [claim] = bench.inbox.claim_ready(now=LATER)
    assert claim.sidecar is not None
    assert msgspec.json.decode(claim.sidecar.read_bytes(), type=BatchOptions) == OPTIONS


@pytest.mark.parametrize("name", ["a.txt", "a.json", ".a.jsonl", "~a.jsonl", "a.jsonl.part"])
def test_a_name_that_the_inbox_would_ignore_is_refused(bench, tmp_path, name):
    (tmp_path / name).write_bytes(make_input(1))

    with pytest.raises(FileRefused):
        submit(tmp_path / name, None, bench.folder)

    assert bench.files_of(bench.folder.inbox) == set()


def test_folders_missing_files_and_files_of_the_inbox_are_refused(bench, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    there = bench.drop("there.jsonl", b"content")

    with pytest.raises(FileRefused, match="folder"):
        submit(tmp_path / "folder.jsonl", None, bench.folder)
    with pytest.raises(FileNotFoundError):
        submit(tmp_path / "missing.jsonl", None, bench.folder)
    with pytest.raises(FileRefused, match="already"):
        submit(there, None, bench.folder)


def test_a_link_is_submitted_as_the_file_that_it_names(bench, source):
    link = source.with_name("link.jsonl")
    link.symlink_to(source)

    dropped = submit(link, None, bench.folder)

    assert dropped.name == "link.jsonl"
    assert not dropped.is_symlink()
