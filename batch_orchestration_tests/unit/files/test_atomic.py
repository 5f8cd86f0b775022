"""Atomic writes, and what a power loss leaves of them and of new folders."""

import os
from pathlib import Path

import pytest

from batch_orchestration.core.errors import DiskFull, StorageError
from batch_orchestration.files.atomic import atomic_writer, make_folder, write_atomically
from batch_orchestration.files.moving import move_into


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fsynced from now on, by path."""
    paths: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        paths.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return paths


def test_each_new_level_is_synced_into_the_one_above_it(tmp_path: Path, synced: list[str]) -> None:
    make_folder(tmp_path / "a" / "b" / "c")

    assert synced == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")]


def test_a_folder_that_is_there_costs_no_sync(tmp_path: Path, synced: list[str]) -> None:
    make_folder(tmp_path)

    assert synced == []


def test_a_file_in_a_new_folder_has_all_of_its_path_synced(
    tmp_path: Path, synced: list[str]
) -> None:
    write_atomically(tmp_path / "a" / "b" / "decision.json", b"{}")

    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")} <= set(synced)


def test_a_file_that_is_moved_into_a_new_folder_has_all_of_its_path_synced(
    tmp_path: Path, synced: list[str]
) -> None:
    (tmp_path / "x.jsonl").touch()

    move_into(tmp_path / "x.jsonl", tmp_path / "a" / "b", "x.jsonl")

    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")} <= set(synced)


def test_nothing_is_visible_until_the_body_ends(tmp_path: Path) -> None:
    path = tmp_path / "outbox" / "output.jsonl"

    with atomic_writer(path) as file:
        file.write(b"half")
        assert not path.exists()

    assert path.read_bytes() == b"half"


def test_a_body_that_raises_leaves_the_old_content_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "output.jsonl"
    write_atomically(path, b"old")

    def write_half() -> None:
        with atomic_writer(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_longest_file_names_can_be_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 127)

    write_atomically(path, b"text")

    assert path.read_bytes() == b"text"


def test_files_are_readable_by_those_whom_the_umask_allows(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()

    write_atomically(tmp_path / "atomic", b"text")

    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "outbox").write_text("a file in the way")

    with pytest.raises(StorageError, match="cannot write"):
        write_atomically(tmp_path / "outbox" / "output.jsonl", b"text")


def test_a_full_disk_met_by_the_body_is_told_as_such(tmp_path: Path) -> None:
    def fill() -> None:
        with atomic_writer(tmp_path / "output.jsonl"), open("/dev/full", "wb", 0) as full:  # noqa: PTH123
            full.write(b"text")

    with pytest.raises(DiskFull):
        fill()
    assert list(tmp_path.iterdir()) == []
