"""Submission: a user's file is copied into the inbox, whole or not at all."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from batch_orchestration.admission.inbox import reason_to_ignore
from batch_orchestration.admission.reading.batch_files import Fingerprint
from batch_orchestration.admission.sidecars import (
    SIDECAR_ENDING,
    find_sidecar,
    own_sidecar,
    read_options,
    sidecar_beside,
)
from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.core.errors import FileRefused
from batch_orchestration.files.atomic import disk_errors, sync_folder
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.moving import NAME_MAX_BYTES, move_if_free, numbered_names

_BLOCK_BYTES = 2**20
#: Drive and folders of a path, which may come from Windows: only the last part is a name.
_FOLDERS = re.compile(r".*[/\\]")


def submit(path: Path, options: BatchOptions | None, folder: DataFolder) -> Path:
    """Copy a batch file into the inbox and return the path of the copy.

    Never overwrites a file of the inbox: the second `a.jsonl` becomes `a (2).jsonl`. The original
    is not changed. Memory does not grow with the file.

    Args:
        path: Named `*.jsonl` or `*.jsonl.gz`.
        options: None to use the side-car beside `path`.
        folder: Its missing folders are created.

    Raises:
        FileRefused: The inbox does not accept the name, kind or side-car of the file, or the file
            is in the inbox already.
        FileStillChanging: The file changed while it was copied.
        FileNotFoundError: The file does not exist.
        StorageError: The inbox cannot be written.
    """
    source = path.resolve(strict=True)
    name = _FOLDERS.sub("", path.name)
    if reason := reason_to_ignore(name, source.stat().st_mode):
        raise FileRefused(f"{name}: {reason}")
    folder.create()
    if folder.inbox in source.parents and folder.rejected not in source.parents:
        raise FileRefused(f"{name} is in the inbox already")
    if options is None:
        options = read_options(own_sidecar(path))
    with _temporary(folder.inbox) as copy, _temporary(folder.inbox) as sidecar:
        _copy(source, copy)
        if options != BatchOptions():
            sidecar.write_bytes(msgspec.json.encode(options) + b"\n")
        target = _drop(copy, sidecar, folder.inbox, name)
        sync_folder(folder.inbox)
    return target


def _copy(source: Path, target: Path) -> None:
    before = Fingerprint.of(source)
    with source.open("rb") as original, disk_errors(target), target.open("xb") as file:
        shutil.copyfileobj(original, file, _BLOCK_BYTES)
        file.flush()
        os.fsync(file.fileno())
    before.verify()


def _drop(copy: Path, sidecar: Path, inbox: Path, name: str) -> Path:
    """Name the finished copy after its side-car, so that no tick sees the file without it."""
    for free_name in numbered_names(name, max_bytes=NAME_MAX_BYTES - len(SIDECAR_ENDING)):
        target = inbox / free_name
        beside = sidecar_beside(target)
        if target.exists() or find_sidecar(target) is not None:
            continue
        if sidecar.exists() and not move_if_free(sidecar, beside):
            continue
        if move_if_free(copy, target):
            return target
        if not sidecar.exists():
            beside.rename(sidecar)
    raise AssertionError("names never run out")


@contextlib.contextmanager
def _temporary(inbox: Path) -> Iterator[Path]:
    # The inbox ignores names with a leading dot.
    path = inbox / f".submit-{secrets.token_hex(8)}.tmp"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
