"""Safe moves of users' files: under any name, and without overwriting another file."""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from batch_orchestration.files.atomic import make_folder, sync_folder

#: Linux's limit on the length of a name, in bytes.
NAME_MAX_BYTES = 255
_ENDING = re.compile(
    r"(\.jsonl(\.gz)?|\.[^.\s]{1,10})?(\.(meta|errors)\.json)?$", flags=re.IGNORECASE
)
#: Errors of `link` on file systems without hard links (exFAT, some network file systems), and
#: between two disks.
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


def readable_name(name: str) -> str:
    """Return the name with bytes that are not UTF-8 replaced by `?`."""
    return name.encode("utf-8", "replace").decode()


def fit_name(stem: str, ending: str, *, max_bytes: int = NAME_MAX_BYTES) -> str:
    """Return `stem + ending`, with the stem cut so that the name has at most `max_bytes`."""
    room = max_bytes - len(ending.encode())
    return stem.encode()[:room].decode(errors="ignore") + ending


def numbered_names(name: str, *, max_bytes: int = NAME_MAX_BYTES) -> Iterator[str]:
    """Yield `x.jsonl`, `x (2).jsonl`, `x (3).jsonl`, … without end."""
    name = readable_name(name)
    match = _ENDING.search(name, 1)  # a leading dot does not begin an ending
    ending = match[0] if match else ""
    stem = name.removesuffix(ending)
    yield fit_name(stem, ending, max_bytes=max_bytes)
    number = 2
    while True:
        yield fit_name(stem, f" ({number}){ending}", max_bytes=max_bytes)
        number += 1


def move_into(source: Path, folder: Path, name: str) -> Path:
    """Move a file into a folder under the first free name, durably, and return its new path.

    A crash during the move can leave the file in both places, but never in neither.
    """
    make_folder(folder)
    for free_name in numbered_names(name):
        target = folder / free_name
        if move_if_free(source, target):
            sync_folder(folder)
            return target
    raise AssertionError("names never run out")


def move_if_free(source: Path, target: Path) -> bool:
    """Move a file unless the target is taken, and return whether it was moved.

    If a crash left source and target as the same file, the move is completed.

    Raises:
        FileNotFoundError: The source is gone.
    """
    try:
        # rename(2) silently overwrites its target; link(2) does not.
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        if is_taken(target, by_other_than=source):
            return False
        source.unlink()
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if is_taken(target, by_other_than=source):
            return False
        if error.errno == errno.EXDEV:
            _copy_over(source, target)
        else:
            source.rename(target)
    else:
        source.unlink()
    return True


def _copy_over(source: Path, target: Path) -> None:
    """Move a file to another disk, durably."""
    part = target.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        shutil.copy2(source, part, follow_symlinks=False)
        if not part.is_symlink():
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.rename(target)
        sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)
    source.unlink()


def is_taken(target: Path, *, by_other_than: Path) -> bool:
    """Whether the target exists and is a different file."""
    try:
        stats = target.lstat()
    except FileNotFoundError:
        return False
    return not os.path.samestat(stats, by_other_than.lstat())


def move_over(source: Path, target: Path) -> None:
    """Move the source onto the target, replacing it. Idempotent: a missing source is ignored."""
    with contextlib.suppress(FileNotFoundError):
        try:
            source.replace(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_over(source, target)
        sync_folder(target.parent)
