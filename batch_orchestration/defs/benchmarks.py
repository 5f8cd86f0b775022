"""The job that measures the engine, so that even the first batch has a time estimate."""

import asyncio
import time

import dagster as dg
from pydantic import Field

from batch_orchestration.core.results import SIMULATED
from batch_orchestration.defs.job_factory import one_op_job
from batch_orchestration.defs.metadata import Metadata, metadata_of, table_of
from batch_orchestration.defs.resources import GpuResource, SettingsResource, open_store
from batch_orchestration.estimates.benchmark import CalibrationReport, calibrate
from batch_orchestration.estimates.engine import engine_in_force
from batch_orchestration.estimates.tables import EstimateTables, cache_engine_info
from batch_orchestration.workers.reporter import report_phase
from batch_orchestration.workers.run_status import MARGIN_SECONDS, WORK_SECONDS


class CalibrationConfig(dg.Config):
    """The extent of the measurement.

    The defaults take less than a minute on a GPU and a few minutes on two CPU cores.
    """

    requests: int = Field(
        32, ge=1, le=1000, description="Requests of each round that keeps the engine busy."
    )
    seconds: float = Field(
        300, gt=0, description="Time limit; no round begins after it but the first."
    )


@one_op_job("measure_engine", pool="gpu")
def benchmark_engine(
    context: dg.OpExecutionContext,
    config: CalibrationConfig,
    gpu: GpuResource,
    settings: SettingsResource,
) -> None:
    """Measure the engine for a few minutes: time estimates use the result until batches have run.

    Launch it once after an installation, and after a change of model, device or engine flags. It
    waits for the device like any other run. It sends made-up prompts of two lengths and
    stores each round in the table `benchmarks`.
    """
    present = gpu.in_force(settings)
    late = present.engine_start_timeout_seconds + MARGIN_SECONDS
    report_phase("starting engine", patience_seconds=max(late, WORK_SECONDS))
    store, in_force = open_store(present), engine_in_force(present)
    engine = gpu.for_run(context.run.run_id, present)
    # The run ends within minutes, so a device fault only keeps the next run from starting.
    with gpu.sampling(context.run.run_id, present):
        report = asyncio.run(
            calibrate(
                engine,
                in_force,
                requests=config.requests,
                seconds=config.seconds,
                run_id=context.run.run_id,
            )
        )
    EstimateTables(store).add_measurements(report.rounds)
    cache_engine_info(engine, in_force, store, at=time.time())
    context.add_output_metadata(_metadata(report))


def _metadata(report: CalibrationReport) -> Metadata:
    engine, costs = report.rounds[0].engine, report.throughput and report.throughput.costs
    made_up = f"{engine}: made up, not the speed of a real engine"
    return metadata_of(
        engine=made_up if engine == SIMULATED else engine,
        failed_requests=report.failed,
        rounds=table_of(
            report.rounds,
            *("requests", "at_a_time", "prompt_tokens", "completion_tokens", "seconds"),
        ),
        seconds_per_1000_prompt_tokens=costs and 1000 * costs.prompt_token,
        seconds_per_1000_completion_tokens=costs and 1000 * costs.completion_token,
        seconds_per_request=costs and costs.request,
        seconds_per_step=costs and costs.step,
    )
