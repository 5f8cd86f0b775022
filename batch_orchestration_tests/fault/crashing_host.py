"""Runs the chunks of one batch, with guests by the queue, and dies at a crash point on the way.

Run as a program: `CRASH_POINT=… python -m batch_orchestration_tests.fault.crashing_host FOLDER
RUN_ID BATCH_ID`.
"""

import sys
from pathlib import Path

from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.store import Store
from batch_orchestration_tests.fault.mixed_batches import run_to_the_end, simulated_engine


def main(root: Path, run_id: str, batch_id: str) -> None:
    folder = DataFolder(root)
    engine = simulated_engine(folder)
    try:
        run_to_the_end(batch_id, folder, Store(folder.duckdb), engine, run_id=run_id)
    finally:
        engine.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
