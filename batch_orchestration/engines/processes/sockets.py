"""The Unix socket of a child server, in a folder that only this user may enter.

vLLM serves many of its paths without checking a key, so no other user may connect.
"""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

PREFIX = "batch-engine-"
#: `sun_path` of unix(7), without its terminating zero.
LONGEST_PATH = 107
#: The backlog requested by uvicorn, which is vLLM's server.
BACKLOG = 2048
BACKLOG_LIMIT = Path("/proc/sys/net/core/somaxconn")


def choose_socket() -> Path:
    """Return an unused path in a folder of its own, which does not exist yet.

    The folder is placed with other temporary files, or in `/tmp` if its path is too long there.
    """
    name = Path(f"{PREFIX}{secrets.token_hex(8)}") / "socket"
    path = tempfile.gettempdir() / name
    return path if len(os.fsencode(path)) <= LONGEST_PATH else "/tmp" / name


def make_private_folder(socket: Path) -> None:
    """Create the folder of a socket.

    Raises:
        OSError: It cannot be created, or it exists already, even if this user created it.
    """
    socket.parent.mkdir(mode=0o700)


def remove_socket(socket: Path) -> None:
    """Remove a socket that is no longer in use, with its folder and nothing else."""
    if not socket.parent.name.startswith(PREFIX):
        return
    # If it cannot be removed, only a folder among temporary files remains.
    with contextlib.suppress(OSError):
        if socket.is_socket():
            socket.unlink()
        socket.parent.rmdir()


def most_connections() -> int:
    """Return how many connections may wait until a server accepts them.

    On Linux, one connection beyond the backlog seems to succeed, and is reset at its first byte.
    """
    try:
        return min(BACKLOG, int(BACKLOG_LIMIT.read_text()))
    except (OSError, ValueError):
        return BACKLOG
