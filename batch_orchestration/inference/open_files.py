"""The limit on open files of this process, and the number of requests in flight that it allows."""

import resource
import sys

from batch_orchestration.files.journal import open_journals

#: Descriptors that a run worker needs besides connections and journals: code, logs, DuckDB,
#: Dagster's SQLite files and the pipes of an engine, with a margin.
RESERVE = 128
#: More than a run ever needs. Not more than that, because engines inherit the limit and some
#: programs iterate over all possible descriptors.
ENOUGH = 65536


def raise_open_file_limit() -> int:
    """Raise this process's limit on open files as far as allowed, or to `ENOUGH`; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(ENOUGH, _number(hard))
    if _number(soft) < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(_number(soft), wanted)


def connections_possible() -> int:
    """Return how many requests may be in flight now, one connection each; at least one.

    The limit on open files, less a reserve (at most half of it) and the open journals.
    """
    soft = _number(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return max(1, soft - min(RESERVE, soft // 2) - open_journals())


def _number(limit: int) -> int:
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit
