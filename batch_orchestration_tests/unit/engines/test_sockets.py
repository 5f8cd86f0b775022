"""A server's socket: a short path, a private folder, and nothing else removed with it."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from batch_orchestration.engines.processes import sockets


def test_no_two_sockets_have_a_folder_in_common() -> None:
    assert len({sockets.choose_socket().parent for _ in range(100)}) == 100


@pytest.mark.parametrize("length", [20, 75, 90, 200])
def test_however_long_the_path_of_temporary_files_a_server_can_listen(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "ä" * length)

    path = sockets.choose_socket()

    assert len(os.fsencode(path)) <= sockets.LONGEST_PATH
    assert (path.parents[1] == Path("/tmp")) == (length > 20)


def test_a_folder_that_somebody_has_made_first_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / f"{sockets.PREFIX}1" / "socket"
    path.parent.mkdir()

    with pytest.raises(FileExistsError):
        sockets.make_private_folder(path)


def test_the_folder_is_private_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / f"{sockets.PREFIX}1" / "socket"
    before = os.umask(0)
    try:
        sockets.make_private_folder(path)
    finally:
        os.umask(before)

    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_socket_is_removed_with_its_folder_and_that_there_is_none_is_no_fault(
    tmp_path: Path,
) -> None:
    path = tmp_path / f"{sockets.PREFIX}1" / "socket"
    sockets.make_private_folder(path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))

    sockets.remove_socket(path)
    sockets.remove_socket(path)

    assert list(tmp_path.iterdir()) == []


def test_what_is_no_socket_of_ours_is_not_removed(tmp_path: Path) -> None:
    """A damaged record may name anything."""
    ours, theirs = tmp_path / f"{sockets.PREFIX}1", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    (ours / "kept.jsonl").write_text("kept")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(theirs / "socket"))

    sockets.remove_socket(ours / "kept.jsonl")
    sockets.remove_socket(theirs / "socket")

    assert (ours / "kept.jsonl").exists()
    assert (theirs / "socket").exists()


@pytest.mark.parametrize(("text", "most"), [("4096\n", 2048), ("128\n", 128), ("", 2048)])
def test_as_many_connections_are_made_as_the_kernel_lets_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, most: int
) -> None:
    (tmp_path / "somaxconn").write_text(text)
    monkeypatch.setattr(sockets, "BACKLOG_LIMIT", tmp_path / "somaxconn")

    assert sockets.most_connections() == most
