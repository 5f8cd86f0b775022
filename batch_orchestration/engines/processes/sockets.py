"""Where a server of ours listens: a Unix socket in a folder that nobody else may enter.

vLLM answers much of what it is asked without looking at a key, so nobody else may ask.
"""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

PREFIX = "batch-engine-"
#: `sun_path` of unix(7), without its final zero.
LONGEST_PATH = 107
#: What uvicorn asks for, which is vLLM's server.
BACKLOG = 2048
BACKLOG_LIMIT = Path("/proc/sys/net/core/somaxconn")


def choose_socket() -> Path:
    """Return a path that nobody has used, in a folder of its own that is yet to be made.

    It lies beside other temporary files, and in `/tmp` if its path were too long there.
    """
    name = Path(f"{PREFIX}{secrets.token_hex(8)}") / "socket"
    path = tempfile.gettempdir() / name
    return path if len(os.fsencode(path)) <= LONGEST_PATH else "/tmp" / name


def make_private_folder(socket: Path) -> None:
    """Make the folder of a socket.

    Raises:
        OSError: It cannot be made, or is there already, whoever made it.
    """
    socket.parent.mkdir(mode=0o700)


def remove_socket(socket: Path) -> None:
    """Remove a socket that nobody listens at any more, with its folder; nothing else."""
    if not socket.parent.name.startswith(PREFIX):
        return
    # What cannot be removed is a folder among temporary files.
    with contextlib.suppress(OSError):
        if socket.is_socket():
            socket.unlink()
        socket.parent.rmdir()


def most_connections() -> int:
    """Return how many connections may wait until a server accepts them.

    On Linux one more than the backlog seems to succeed, and is reset at its first byte.
    """
    try:
        return min(BACKLOG, int(BACKLOG_LIMIT.read_text()))
    except (OSError, ValueError):
        return BACKLOG
