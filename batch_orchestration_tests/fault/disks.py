"""Small file systems that can be filled; they need the right to mount."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(place: Path, *, mebibytes: int) -> Iterator[Path]:
    """Mount a new file system of that size; the test is skipped where that is not allowed."""
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", place)
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("needs the right to mount a file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, *, but: int) -> Path:
    """Leave no more than so many bytes free; return the file that takes the rest."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - but)
    return ballast
