"""The composition root: everything that Dagster loads, put together from the settings."""

import dagster as dg

from batch_orchestration.defs import (
    alerts,
    assets,
    benchmarks,
    checks,
    health,
    housekeeping,
    jobs,
    lifecycle,
    queue,
    recovery,
    replays,
    sensors,
)
from batch_orchestration.defs.resources import GpuResource
from batch_orchestration.files.sharing import keep_from_others
from batch_orchestration.settings import Settings, load_settings


def definitions(settings: Settings) -> dg.Definitions:
    """Return all definitions, for a deployment with these settings."""
    owned = dg.map_asset_specs(
        lambda spec: spec.replace_attributes(owners=[settings.owner]),
        [assets.batch_manifest, assets.chunk_results, assets.batch_output, queue.queue_overview],
    )
    return dg.Definitions(
        assets=owned,
        asset_checks=[
            checks.every_request_has_an_outcome,
            checks.failure_rate_within_budget,
            health.deployment_is_healthy,
        ],
        jobs=[
            *(jobs.admit_batch, jobs.submit_batch, jobs.answer_chunks, jobs.deliver_batch),
            *(lifecycle.cancel_batch, lifecycle.resume_batch),
            *(queue.pause_queue, queue.resume_queue),
            replays.replay_failed_requests,
            benchmarks.benchmark_engine,
            housekeeping.housekeeping,
        ],
        sensors=[
            *(sensors.inbox_sensor, sensors.dispatch_sensor, replays.replay_sensor),
            *(health.health_sensor, alerts.alert_sensor, recovery.recovery_sensor),
        ],
        schedules=housekeeping.schedules(settings),
        resources={
            "settings": settings,
            "gpu": GpuResource(),
            "alerts": alerts.AlertsResource.of(settings),
        },
        # Retries of a step keep the engine loaded, and a killed run worker leaves no orphaned step
        # behind that holds the device.
        executor=dg.in_process_executor,
    )


keep_from_others()
defs = definitions(load_settings())
