"""What a run worker executes: Dagster's own command for it, with a heart that beats beside it.

`python -m batch_orchestration.run_worker RUN JOB api execute_run …`, see `launcher`. The heart
beats from before Dagster is imported until the process ends, so that there is no time in which a
worker hangs unnoticed. The signal that asks for stacks makes each thread write where it is.
"""

import contextlib
import faulthandler
import os
import sys
from collections.abc import Iterator

from batch_orchestration.services.heart import beating
from batch_orchestration.services.open_files import raise_open_file_limit
from batch_orchestration.services.run_workers import STACKS_SIGNAL
from batch_orchestration.settings import load_settings
from batch_orchestration.storage.files import DataFolder


def main() -> None:
    """Execute a run."""
    run_id, job, *command = sys.argv[1:]
    # Of its own: while a step runs, Dagster has the standard one go elsewhere.
    raise_open_file_limit()
    faulthandler.register(STACKS_SIGNAL, file=os.dup(sys.stderr.fileno()), all_threads=True)
    with _heart(run_id, job):
        from dagster._cli import cli

        cli(command)


@contextlib.contextmanager
def _heart(run_id: str, job: str) -> Iterator[None]:
    try:
        settings = load_settings()
    except ValueError as error:  # pydantic's is one, too
        # The definitions cannot be loaded either, which the run will say better.
        print(f"no heartbeat: {error}", file=sys.stderr)
        yield
        return
    with beating(
        folder=DataFolder(settings.data_dir),
        run_id=run_id,
        job=job,
        every_seconds=settings.heartbeat_seconds,
    ):
        yield


if __name__ == "__main__":
    main()
