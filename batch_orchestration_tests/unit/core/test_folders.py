"""New folders survive a power loss: each level's own entry is synced, not only the last one's."""

import os
from pathlib import Path

import pytest

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.atomic import make_folder, write_atomically
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


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()

    with pytest.raises(StorageError):
        write_atomically(tmp_path / "a" / "decision.json", b"{}")
