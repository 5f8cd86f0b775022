"""A data folder of a deployment that is well, and ways to make each part of it ill."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import msgspec

from batch_orchestration.engines.processes.records import identify
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.health.examine import examine_health
from batch_orchestration.operations.health.report import Finding, HealthReport
from batch_orchestration.queue.entries import (
    EntryKind,
    EntryState,
    NeedsAttention,
    QueueEntry,
)
from batch_orchestration.queue.files import write_needs_attention
from batch_orchestration.settings import Settings
from batch_orchestration.workers.heartbeat import Heartbeat
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.workbench import Workbench

#: Reserves nothing, so that the disk of whoever runs the tests does not matter.
SETTINGS: dict[str, Any] = {"engine": "simulated", "disk_reserve_bytes": 0}


class HealthBench(Workbench):
    """Ticks as Dagster's sensors do, on a clock that the test moves."""

    def __init__(self, root: Path, **settings: Any) -> None:
        super().__init__(root / "data", lock_seconds=5)
        values = {**SETTINGS, "data_dir": self.folder.root, **settings}
        self.in_force = Settings(**values, _env_file=None)
        self.store.migrate()
        self.now = NOW

    def tick(self, *entries: QueueEntry, needs: tuple[NeedsAttention, ...] = ()) -> None:
        """What `dispatch_sensor` leaves behind."""
        self.queue(*entries, at=self.now)
        write_needs_attention(self.folder, needs)

    def look(self, **arguments: Any) -> HealthReport:
        """Look once, as the command does."""
        return examine_health(settings=self.in_force, folder=self.folder, now=self.now, **arguments)

    def watch(self) -> HealthReport:
        """Look once and keep what was found, as the sensor does."""
        report = self.look()
        StateFile(self.folder.health, HealthReport).write(report)
        return report

    def find(self, check: str) -> Finding:
        """Look once and return the finding of one check."""
        found = {finding.check: finding for finding in self.look().findings}
        return found[check]

    def beat(self, run_id: str = "run-1", **fields: Any) -> None:
        """Write the heartbeat of a run whose worker is this process."""
        me = identify(os.getpid())
        assert me is not None
        values = {
            "run_id": run_id,
            "job": "answer_chunks",
            "pid": me.pid,
            "started": me.started,
            "boot_id": me.boot_id,
            "at": self.now,
            "phase": "feeding",
            "progress_at": self.now,
            "patience_seconds": 120.0,
        }
        path = self.folder.root / "heartbeats" / f"{run_id}.json"
        path.parent.mkdir(exist_ok=True)
        beat = Heartbeat(**{**values, **fields})
        path.write_bytes(msgspec.json.encode(beat))
        os.utime(path, (beat.at, beat.at))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store as a stranger who reads it: nobody can write meanwhile."""
        connection = duckdb.connect(self.folder.duckdb, read_only=True)
        try:
            yield
        finally:
            connection.close()


def entry(entry_id: str = "a-1b2c3d4e", **fields: Any) -> QueueEntry:
    """Something in the queue that nothing keeps."""
    values = {
        "kind": EntryKind.BATCH,
        "id": entry_id,
        "batch_id": entry_id,
        "source": "alice",
        "priority": 0,
        "effective_priority": 0.0,
        "state": EntryState.ADMITTED,
        "place": 1,
        "pending": 10,
    }
    return QueueEntry(**{**values, **fields})
