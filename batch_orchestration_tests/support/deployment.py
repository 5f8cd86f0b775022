"""A deployment within the test's process: definitions, an instance, and runs as the daemon asks."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dagster as dg

from batch_orchestration.definitions import definitions
from batch_orchestration.defs.job_factory import config_of
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.lifecycle.cancellation import cancel
from batch_orchestration.settings import EngineKind, Settings
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import believe_the_clock

STARTED = dg.DagsterRunStatus.STARTED
FAILURE, CANCELED = dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED


def materializations(
    result: dg.ExecuteInProcessResult, asset: str = "chunk_results"
) -> dict[str, dict[str, Any]]:
    """The metadata of the partitions of an asset that a run has materialized."""
    return {
        event.materialization.partition or "": {
            name: value.value for name, value in event.materialization.metadata.items()
        }
        for event in result.all_events
        if event.is_step_materialization and event.asset_key == dg.AssetKey(asset)
    }


def memory_instance() -> dg.DagsterInstance:
    """An instance in memory, which nobody will migrate.

    Dagster writes down the revision of its schema there, too, and for that loads all its migrations
    twice: two thirds of the time.
    """
    storage = "dagster._core.storage"
    with (
        patch(f"{storage}.runs.in_memory.stamp_alembic_rev", lambda *_: None),
        patch(f"{storage}.event_log.in_memory.stamp_alembic_rev", lambda *_: None),
    ):
        return dg.DagsterInstance.ephemeral(settings={"telemetry": {"enabled": False}})


class Deployment:
    """Definitions over a temporary data folder, with the simulated engine and small chunks."""

    def __init__(self, root: Path, **settings: Any) -> None:
        values: dict[str, Any] = {
            "data_dir": root / "data",
            "engine": EngineKind.SIMULATED,
            "model_aliases": {"*": "simulated-model"},
            "requests_per_chunk": 5,
            "settle_seconds": 0.0,
        }
        self.settings = Settings(**{**values, **settings}, _env_file=None)
        self.folder = DataFolder(self.settings.data_dir)
        self.folder.create()
        believe_the_clock(self.folder)
        self.store = Store(self.folder.duckdb, deadline_seconds=10)
        self.instance = memory_instance()
        self.repository = definitions(self.settings).get_repository_def()

    def close(self) -> None:
        """Remove what Dagster keeps for a temporary instance."""
        self.instance.dispose()

    def drop(self, name: str, content: bytes) -> Path:
        """Put a file into the inbox that has rested for a while."""
        path = self.folder.inbox / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        os.utime(path)
        return path

    def tick(self, sensor: str) -> dg.SensorResult | dg.SkipReason:
        """Evaluate a sensor once."""
        context = dg.build_sensor_context(
            instance=self.instance,
            repository_def=self.repository,
            resources={"settings": self.settings},
        )
        result = self.repository.get_sensor_def(sensor)(context)
        assert isinstance(result, dg.SensorResult | dg.SkipReason)
        return result

    def requests(self, sensor: str) -> list[dg.RunRequest]:
        """Evaluate a sensor once and return the runs that it asks for."""
        result = self.tick(sensor)
        return list(result.run_requests or []) if isinstance(result, dg.SensorResult) else []

    def reason(self, sensor: str) -> str:
        """Evaluate a sensor once and return why it skips."""
        result = self.tick(sensor)
        assert isinstance(result, dg.SkipReason), result
        return result.skip_message or ""

    def run(
        self, request: dg.RunRequest, *, run_config: Mapping[str, Any] | None = None
    ) -> dg.ExecuteInProcessResult:
        """Execute a requested run here."""
        result = self.repository.get_job(request.job_name or "admit_batch").execute_in_process(
            instance=self.instance,
            tags=dict(request.tags),
            partition_key=request.partition_key,
            run_config=run_config or request.run_config,
            raise_on_error=False,
        )
        self.repository = definitions(self.settings).get_repository_def()
        return result

    def launch(self, job: str, **config: Any) -> dg.ExecuteInProcessResult:
        """Launch a job of one op, as a person does."""
        definition = self.repository.get_job(job)
        return self.run(dg.RunRequest(job_name=job, run_config=config_of(definition, **config)))

    def pretend(
        self, request: dg.RunRequest, status: dg.DagsterRunStatus, **tags: str
    ) -> dg.DagsterRun:
        """Leave behind the run that was asked for, in the state that the daemon would have seen."""
        partition = {"dagster/partition": request.partition_key} if request.partition_key else {}
        run = self.instance.create_run_for_job(
            self.repository.get_job(request.job_name or "admit_batch"),
            status=STARTED if status in (FAILURE, CANCELED) else status,
            run_config=request.run_config,
            tags={**request.tags, **partition, **tags},
        )
        if status is FAILURE:
            self.instance.report_run_failed(run)
        elif status is CANCELED:
            self.instance.report_run_canceled(run)
        return run

    def work_off(self) -> list[dg.ExecuteInProcessResult]:
        """Run all that dispatch asks for, until it asks for nothing more."""
        results = []
        while requests := self.requests("dispatch_sensor"):
            results += [self.run(request) for request in requests]
            assert all(result.success for result in results)
        return results

    def admit(self, name: str, content: bytes) -> str:
        """Drop a file and admit it; return the batch's id."""
        self.drop(name, content)
        (request,) = self.requests("inbox_sensor")
        known = set(self.folder.batch_ids())
        assert self.run(request).success
        (batch_id,) = set(self.folder.batch_ids()) - known
        return batch_id

    def cancel(self, batch_id: str) -> None:
        """Cancel a batch, as a person does."""
        cancel(
            batch_id,
            folder=self.folder,
            store=self.store,
            actor="tester",
            reason="",
            at=time.time(),
        )

    def statuses(self, asset: str) -> set[str]:
        """Keys of the materialized partitions of an asset."""
        return self.instance.get_materialized_partitions(dg.AssetKey(asset))
