"""State files: nothing there, damaged, or the value."""

import os
import socket
from pathlib import Path

import pytest

from batch_orchestration.core.errors import FileDamaged
from batch_orchestration.files.regular import open_regular, read_regular
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.queue.entries import Pause


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        previous = Path.cwd()
        os.chdir(path.parent)  # the path of a socket may have 108 bytes
        try:
            listener.bind(path.name)
        finally:
            os.chdir(previous)


DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(b'{"at": 17'),
    "another type": lambda path: path.write_bytes(b'{"at": "noon", "actor": 3}'),
    "another kind": lambda path: path.write_bytes(b"[1, 2]"),
    "not UTF-8": lambda path: path.write_bytes(b'{"at": 1, "actor": "\xff"}'),
    "nested": lambda path: path.write_bytes(b'{"x": ' + b"[" * 100_000),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a socket": socket_at,
    "a dangling link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "a link in a circle": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_of_every_kind_has_one_exception_with_the_path(tmp_path, how):
    path = tmp_path / "paused.json"
    DAMAGES[how](path)

    with pytest.raises(FileDamaged) as raised:
        StateFile(path, Pause).read()

    assert raised.value.path == path
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("read", [read_regular, open_regular])
@pytest.mark.parametrize("how", ["a folder", "a pipe"])
def test_what_is_no_file_costs_no_descriptor_and_is_named(tmp_path, how, read):
    """A tick reads each file anew: one lost at each would end the daemon within hours."""
    path = tmp_path / "clock.json"
    DAMAGES[how](path)
    before = len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(20):
        with pytest.raises((OSError, FileDamaged), match=str(path)):
            read(path)

    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_that_may_not_be_read_is_damaged(tmp_path, monkeypatch):
    path = tmp_path / "paused.json"

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)

    with pytest.raises(FileDamaged, match="Permission denied"):
        StateFile(path, Pause).read()
