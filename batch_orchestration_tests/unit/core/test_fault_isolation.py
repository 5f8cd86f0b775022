"""Loops over members: what is one member's fault, and what is everyone's."""

import errno
from pathlib import Path

import pytest

from batch_orchestration.core.errors import (
    BatchNotFound,
    DiskFull,
    FileDamaged,
    StoreDamaged,
    StoreLocked,
)
from batch_orchestration.core.fault_isolation import Faults


def visited(error, faults):
    seen = []
    for member in ("a", "b", "c"):
        with faults.of(member):
            if member == "b":
                raise error
            seen.append(member)
    return seen


@pytest.mark.parametrize(
    "error",
    [
        FileDamaged(Path("x.json"), "is empty"),
        BatchNotFound("no batch 'b'"),
        OSError(errno.EIO, "Input/output error"),
        PermissionError(errno.EACCES, "Permission denied"),
        RecursionError("too deep"),
        KeyError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_fault_of_one_member_leaves_the_others_as_they_are(error):
    faults = Faults()

    assert visited(error, faults) == ["a", "c"]

    (fault,) = faults
    assert fault.member == "b"
    assert "b" in faults
    assert "a" not in faults


@pytest.mark.parametrize(
    "error",
    [
        StoreLocked("locked"),
        StoreDamaged("damaged"),
        DiskFull("no room"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EMFILE, "Too many open files"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_concerns_every_member_ends_the_loop(error):
    faults = Faults()

    with pytest.raises(type(error)):
        visited(error, faults)

    assert list(faults) == []


def test_a_damaged_file_is_named_by_its_path():
    faults = Faults()

    visited(FileDamaged(Path("batches/b/plan.json"), "is empty"), faults)

    (fault,) = faults
    assert fault.path == Path("batches/b/plan.json")
    assert str(fault) == "b: batches/b/plan.json is empty"
