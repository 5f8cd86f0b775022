"""Who may do what in the data folder: its group may decide, others may not even look.

umask 027                    of every process: what it makes is read by the group, written by us
folders where people decide  2770: whoever is in the group submits, cancels, pauses, replays;
what they make there belongs to the group, so that we can read it
locks and the store          0660: a decision is made under a lock, and told to the store
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
    """Let this process make nothing that others can read; each entry point calls it first."""
    os.umask(UMASK)


def share(path: Path) -> None:
    """Let the group write to a folder or file of ours, and others do nothing.

    What belongs to somebody else stays as it is: `health` says if others may read it.
    """
    mode = _SHARED_FOLDER if path.is_dir() else _SHARED_FILE
    # Compared first: it is called often, and a change of mode moves ctime.
    with contextlib.suppress(PermissionError):
        if path.stat().st_mode & 0o7777 != mode:
            path.chmod(mode)


def shared_lock(path: Path) -> BaseFileLock:
    """Return a lock that everybody in the group can take."""
    return FileLock(path, mode=_SHARED_FILE)


@contextlib.contextmanager
def made_for_the_group() -> Iterator[None]:
    """Let the group write to files that a library makes meanwhile, in any thread of ours."""
    before = os.umask(_GROUP_UMASK)
    try:
        yield
    finally:
        os.umask(before)
