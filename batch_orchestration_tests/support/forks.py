"""Child processes of fault tests, forked from a process that has imported everything once.

Python, Dagster, DuckDB and aiohttp take one to four seconds of a processor to start and import,
more than most accidents do. A fork has them at once, and is killed as any other process is. What is
about starting itself (the environment, signals, `atexit`) needs a program: see `children`.
"""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from batch_orchestration.core import crash_points

ROOT = Path(__file__).parents[2]

_context = multiprocessing.get_context("forkserver")
# No thread, database or event loop is open in the server; it only imports. `pytest`, because each
# fork imports the main module of this process.
_context.set_forkserver_preload(
    [
        "pytest",
        "pandas",
        "batch_orchestration_tests.fault.crashing_asset",
        "batch_orchestration_tests.support.workbench",
    ]
)


@contextlib.contextmanager
def forked(
    work: Callable[..., object], *arguments: object, crash_point: str | None = None
) -> Iterator[ForkServerProcess]:
    """Start `work`, a function of a module, in a process of its own; it is dead afterwards."""
    with contextlib.chdir(ROOT):
        forkserver.ensure_running()
    process = _context.Process(target=_begin, args=(crash_point, work, arguments))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def run_forked(
    work: Callable[..., object], *arguments: object, crash_point: str | None = None
) -> int:
    """Run `work` in a process of its own; return its exit code, negative if a signal ended it."""
    with forked(work, *arguments, crash_point=crash_point) as process:
        process.join(600)
        assert process.exitcode is not None, f"{work} has not ended"
    return process.exitcode


def _begin(
    crash_point: str | None, work: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    if crash_point is not None:
        crash_points.arm(crash_point)
    work(*arguments)
