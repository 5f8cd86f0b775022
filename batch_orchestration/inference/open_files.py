"""How many files this process may have open, and what that leaves for requests in flight."""

import resource
import sys

from batch_orchestration.files.journal import open_journals

#: Descriptors that a run worker needs beside connections and journals: code, logs, DuckDB,
#: Dagster's SQLite files, the pipes of an engine; and some that nobody counts.
RESERVE = 128
#: More than a run ever needs; engines inherit it, and some programs walk through all there may be.
ENOUGH = 65536


def raise_open_file_limit() -> int:
    """Let this process open as many files as the system allows it, or enough; return how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(ENOUGH, _number(hard))
    if _number(soft) < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(_number(soft), wanted)


def connections_possible() -> int:
    """Return how many requests may be in flight now, one connection each; at least one.

    The limit on open files, less a reserve (half of a limit that is very small) and the journals
    that are open.
    """
    soft = _number(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return max(1, soft - min(RESERVE, soft // 2) - open_journals())


def _number(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
