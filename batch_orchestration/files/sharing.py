"""Permissions in the data folder: its group may make decisions, others have no access.

umask 027                   in every process: the group can read our files, only we can write them
folders for decisions 2770  members of the group submit, cancel, pause and replay there; the setgid
                            bit gives their files to the group, so that we can read them
locks and the store 0660    a decision is made under a lock and written to the store
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock

UMASK = 0o027
_GROUP_UMASK = 0o007
_SHARED_FOLDER, _SHARED_FILE = 0o2770, 0o660
OTHERS = 0o007


def keep_from_others() -> None:
    """Set the umask so that others cannot read new files; every entry point calls this first."""
    os.umask(UMASK)


def share(path: Path) -> None:
    """Give the group write access to a folder or file of ours, and others none.

    Files of other owners are left unchanged; `health` reports them if others can read them.
    """
    mode = _SHARED_FOLDER if path.is_dir() else _SHARED_FILE
    # Skip a chmod that changes nothing: it would update ctime, and calls are frequent.
    with contextlib.suppress(PermissionError):
        if path.stat().st_mode & 0o7777 != mode:
            path.chmod(mode)


def shared_lock(path: Path) -> BaseFileLock:
    """Return a lock that every member of the group can take."""
    return FileLock(path, mode=_SHARED_FILE)


@contextlib.contextmanager
def made_for_the_group() -> Iterator[None]:
    """Make files created within the context, by any thread, writable for the group."""
    before = os.umask(_GROUP_UMASK)
    try:
        yield
    finally:
        os.umask(before)
