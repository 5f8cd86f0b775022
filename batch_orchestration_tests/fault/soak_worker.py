"""A run worker without Dagster: takes unfinished batches from the store until it is killed.

Run as a program: `python -m batch_orchestration_tests.fault.soak_worker FOLDER`.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import (
    DiskFull,
    EngineRefusesUs,
    EngineStartFailed,
    FileDamaged,
    OutboxUnwritable,
)
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.halts import halt_in_force
from batch_orchestration.store.store import Store
from batch_orchestration_tests.fault.mixed_batches import run_to_the_end, simulated_engine

#: What ends a run, which Dagster then starts again: an engine killed while it starts, a gate that
#: is closed, a file that is to be mended, a disk without room for what a run cannot wait with.
TRIED_AGAIN = (EngineStartFailed, EngineRefusesUs, FileDamaged, DiskFull, OutboxUnwritable)


def main(root: Path) -> None:
    folder = DataFolder(root)
    store = Store(folder.duckdb, deadline_seconds=60.0)
    engine = simulated_engine(folder)
    while True:
        for batch in store.batches():
            with contextlib.suppress(*TRIED_AGAIN):
                if batch.status is BatchStatus.COMPLETED or halt_in_force(folder, batch.batch_id):
                    continue
                run_to_the_end(
                    batch.batch_id, folder, store, engine, run_id=f"worker-{os.getpid()}"
                )
        time.sleep(0.2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
