"""Recovery: cleans up after runs that have no successor, or whose worker is gone."""

import time
from collections.abc import Iterator

import dagster as dg

from batch_orchestration.defs.resources import SettingsResource, data_folder
from batch_orchestration.engines.processes.records import is_running
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.workers.cleanup import (
    clear_after,
    clear_after_crashes,
    end_worker,
    living_workers,
    recorded_worker,
    unreadable_heartbeats,
)

INTERVAL_SECONDS = 10
#: The launcher records a worker at once, and its first heartbeat does so within seconds.
RECORD_SECONDS = 60.0
#: A worker ends within seconds of its run, once its engine has released the device.
END_SECONDS = 60.0


@dg.sensor(
    minimum_interval_seconds=INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Cleans up after dead run workers, also after a restart of the machine: ends engines "
        "that hold device memory and removes heartbeats. Fails runs whose worker died while it "
        "started, and ends workers that outlive their run. Finds processes only by the records "
        "of their start. Each tick lists its actions. Starts no runs."
    ),
)
def recovery_sensor(
    context: dg.SensorEvaluationContext, settings: SettingsResource
) -> dg.SkipReason:
    """Clean up after dead workers; a cleanup that fails is repeated at the next tick."""
    folder, instance = data_folder(settings), context.instance
    actions = [
        *_lost_starts(instance, folder),
        *_outliving(instance, folder),
        *clear_after_crashes(folder),
        *_unreadable(instance, folder, settings.silent_seconds),
    ]
    for action in actions:
        context.log.warning(action)
    return dg.SkipReason("; ".join(actions) or "there was nothing to clean up")


def _lost_starts(instance: dg.DagsterInstance, folder: DataFolder) -> Iterator[str]:
    """Fail runs whose worker died before they began: Dagster's monitoring waits for these."""
    starting = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING])
    for record in instance.get_run_records(starting):
        run = record.dagster_run
        worker = recorded_worker(run.run_id, run.tags, folder)
        if worker is not None and is_running(worker.process):
            continue
        if worker is None and time.time() - record.update_timestamp.timestamp() < RECORD_SECONDS:
            continue
        # Since the query the run may have begun, and ended.
        now = instance.get_run_by_id(run.run_id)
        if now is not None and now.status is dg.DagsterRunStatus.STARTING:
            name = "the worker" if worker is None else f"run worker {worker.pid}"
            message = f"{name} of run {run.run_id} died while it started"
            instance.report_run_failed(run, message)
            yield message


def _outliving(instance: dg.DagsterInstance, folder: DataFolder) -> Iterator[str]:
    """End workers that exist long after their run has ended: canceled ones that hang."""
    for run_id, worker in living_workers(folder).items():
        record = instance.get_run_record_by_id(run_id)
        if record is None or not record.dagster_run.is_finished:
            continue
        if time.time() - (record.end_time or 0.0) > END_SECONDS:
            end_worker(worker)
            clear_after(run_id, folder)
            yield f"ended run worker {worker.pid}, which had outlived run {run_id}"


def _unreadable(
    instance: dg.DagsterInstance, folder: DataFolder, silent_seconds: float
) -> Iterator[str]:
    """Remove unreadable heartbeats of runs that are not at work."""
    for run_id, at in unreadable_heartbeats(folder).items():
        run = instance.get_run_by_id(run_id)
        if time.time() - at > silent_seconds and (run is None or run.is_finished):
            clear_after(run_id, folder)
            yield f"removed the heartbeat of run {run_id}, which was unreadable"
