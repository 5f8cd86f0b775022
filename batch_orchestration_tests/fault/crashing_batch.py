"""Runs one batch of a data folder to its end; the accident on the way is named by the crash point.

With `engine` as the victim the engine is killed at the point instead of this process, and the file
`accident` says that it was.
"""

import os
import signal
from pathlib import Path

from batch_orchestration.core import crash_points
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.store import Store
from batch_orchestration_tests.fault.mixed_batches import (
    engine_leaders,
    run_to_the_end,
    simulated_engine,
)


def kill_the_engine_instead(folder: DataFolder) -> None:
    """Let the accident befall the engine."""

    def kill_engine() -> None:
        # There is none where the engine has just died by itself.
        for leader in engine_leaders(folder):
            os.kill(leader, signal.SIGKILL)
        (folder.root / "accident").touch()

    crash_points.accident = kill_engine


def run_batch(root: Path, run_id: str, victim: str, batch_id: str | None = None) -> None:
    """Run this batch, or the only one; others may be its guests."""
    folder = DataFolder(root)
    if victim == "engine":
        kill_the_engine_instead(folder)
    if batch_id is None:
        (batch_id,) = folder.batch_ids()
    engine = simulated_engine(folder)
    try:
        run_to_the_end(batch_id, folder, Store(folder.duckdb), engine, run_id=run_id)
    finally:
        engine.stop()
