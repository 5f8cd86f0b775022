"""Moves never overwrite, never lose, and give every name a home."""

import errno
import itertools
import os

import pytest

from batch_orchestration.files.moving import (
    NAME_MAX_BYTES,
    fit_name,
    move_if_free,
    move_into,
    move_over,
    numbered_names,
)


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("a.jsonl", "a (2).jsonl"),
        ("a.JSONL.gz", "a (2).JSONL.gz"),
        ("v1.2.jsonl", "v1.2 (2).jsonl"),
        ("a.jsonl.meta.json", "a (2).jsonl.meta.json"),
        ("a.meta.json", "a (2).meta.json"),
        ("a b.txt", "a b (2).txt"),
        ("Dr. No", "Dr. No (2)"),
        ("noending", "noending (2)"),
        (".hidden", ".hidden (2)"),
        ("bad\udcff.jsonl", "bad? (2).jsonl"),
    ],
)
def test_the_number_stands_before_the_ending(name, second):
    assert list(itertools.islice(numbered_names(name), 2))[1] == second


@pytest.mark.parametrize("stem", ["x" * 300, "é" * 200, "名" * 120])
def test_names_never_get_longer_than_the_file_system_allows(stem):
    for name in itertools.islice(numbered_names(f"{stem}.jsonl"), 12):
        assert len(name.encode()) <= NAME_MAX_BYTES
        assert name.endswith(".jsonl")
    assert len(fit_name(stem, ".errors.json").encode()) <= NAME_MAX_BYTES


def test_a_file_is_moved_beside_its_namesakes(tmp_path):
    for content in ("1", "2", "3"):
        source = tmp_path / "a.jsonl"
        source.write_text(content)
        move_into(source, tmp_path / "there", "a.jsonl")

    there = {p.name: p.read_text() for p in (tmp_path / "there").iterdir()}
    assert there == {"a.jsonl": "1", "a (2).jsonl": "2", "a (3).jsonl": "3"}
    assert not source.exists()


def test_without_hard_links_files_are_moved_all_the_same(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("mine")
    target.write_text("yours")

    assert not move_if_free(source, target)
    assert target.read_text() == "yours"
    assert move_if_free(source, tmp_path / "c")
    assert (tmp_path / "c").read_text() == "mine"


def test_a_move_that_a_crash_cut_in_half_is_completed(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("mine")
    target.hardlink_to(source)

    assert move_if_free(source, target)
    assert target.read_text() == "mine"
    assert not source.exists()


def test_other_errors_of_a_move_are_raised(tmp_path):
    with pytest.raises(FileNotFoundError):
        move_if_free(tmp_path / "nothing", tmp_path / "b")


def test_a_move_over_a_note_of_ours_can_be_repeated(tmp_path):
    source, target = tmp_path / "new", tmp_path / "note"
    source.write_text("new")
    target.write_text("old")

    move_over(source, target)
    move_over(source, target)

    assert target.read_text() == "new"
