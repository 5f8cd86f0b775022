"""A data folder with a store, and chunks run in it: what tests of the chunk runner stand at."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.engines.base import Engine
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.inference.faults.retries import RetryPolicy
from batch_orchestration.inference.run import CommittedChunk, RunPolicy, run_chunks
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import NOW, believe_the_clock, make_batch

SETTINGS = {"engine": "simulated", "model": "demo-model"}


def make_feeding(**fields: Any) -> RunPolicy:
    """Feeding without waits between attempts, however many requests are scripted to fail."""
    values: dict[str, Any] = {
        "in_flight": 8,
        "retry": RetryPolicy(max_attempts=3, base_delay_seconds=0.0),
        "engine_restarts": 2,
        "model_aliases": {},
        "max_tokens_cap": None,
        "answer_settings": SETTINGS,
        "max_failure_rate": 1.0,
    }
    return RunPolicy(**{**values, **fields})


class Workbench:
    """One data folder; `run` is what the op of `chunk_results` does."""

    def __init__(self, root: Path, *, lock_seconds: float = 60.0) -> None:
        self.folder = DataFolder(root)
        self.folder.create()
        believe_the_clock(self.folder)
        self._lock_seconds = lock_seconds
        self.store = Store(self.folder.duckdb, deadline_seconds=lock_seconds)

    def copied(self, root: Path) -> Self:
        """The same with a copy of the data folder, for what takes long to prepare."""
        shutil.copytree(self.folder.root, root, dirs_exist_ok=True)
        other = copy.copy(self)
        other.folder = DataFolder(root)
        other.store = Store(other.folder.duckdb, deadline_seconds=self._lock_seconds)
        return other

    def admitted(self, requests: int, *, requests_per_chunk: int = 10) -> BatchPlan:
        """A batch of usable requests, ready to run."""
        plan = make_batch(self.folder, requests, requests_per_chunk=requests_per_chunk)
        self.store.add_batch(plan, at=NOW)
        return plan

    def run(
        self,
        plan: BatchPlan,
        engine: Engine,
        *,
        numbers: Sequence[int] | None = None,
        run_id: str = "run-1",
        force: bool = False,
        **feeding: Any,
    ) -> list[CommittedChunk]:
        """Run chunks of a batch to the end."""
        chosen = range(len(plan.chunks)) if numbers is None else numbers
        return list(
            run_chunks(
                {plan.batch_id: chosen},
                engine=engine,
                folder=self.folder,
                store=self.store,
                run_id=run_id,
                feeding=make_feeding(**feeding),
                force=force,
            )
        )

    def indices(self, plan: BatchPlan) -> list[int]:
        """Indices of all committed requests, in the store's order."""
        return [settled.index for settled in self.store.settled(plan.batch_id)]
