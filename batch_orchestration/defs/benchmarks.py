"""The job that measures the engine, so that even the first batch has a time estimate."""

import asyncio
import time

import dagster as dg
from pydantic import Field

from batch_orchestration.core.errors import BatchOrchestrationError
from batch_orchestration.core.results import SIMULATED
from batch_orchestration.defs.resources import GpuResource, SettingsResource, open_store
from batch_orchestration.estimates.benchmark import CalibrationReport, calibrate
from batch_orchestration.estimates.engine import cache_engine_info, engine_in_force
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration.workers.reporter import report_phase
from batch_orchestration.workers.vitals import MARGIN_SECONDS, WORK_SECONDS


class CalibrationConfig(dg.Config):
    """The extent of the measurement.

    The defaults take less than a minute on a GPU and a few minutes on two CPU cores.
    """

    requests: int = Field(
        32, ge=1, le=1000, description="Of each round that keeps the engine busy."
    )
    seconds: float = Field(
        300, gt=0, description="After so many no further round is begun; the first one always is."
    )


@dg.op(pool="gpu")
def measure_engine(
    context: dg.OpExecutionContext,
    config: CalibrationConfig,
    gpu: GpuResource,
    settings: SettingsResource,
) -> None:
    """Send made-up prompts of two lengths to the engine and keep their cost in `benchmarks`."""
    present = gpu.in_force(settings)
    late = present.engine_start_timeout_seconds + MARGIN_SECONDS
    report_phase("starting engine", patience_seconds=max(late, WORK_SECONDS))
    store, in_force = open_store(present), engine_in_force(present)
    engine = gpu.for_run(context.run.run_id, present)
    try:
        # The run ends within minutes, so a device fault only keeps the next run from starting.
        with gpu.sampling(context.run.run_id, present):
            report = asyncio.run(
                calibrate(
                    engine,
                    requests=config.requests,
                    seconds=config.seconds,
                    at_a_time=in_force.at_a_time,
                    run_id=context.run.run_id,
                )
            )
        EstimateTables(store).add_runs(report.runs, model=in_force.model, device=in_force.device)
        cache_engine_info(engine, in_force, store, at=time.time())
    except BatchOrchestrationError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    context.add_output_metadata(_metadata(report))


@dg.job
def benchmark_engine() -> None:
    """Measure the engine for a few minutes: time estimates use the result until batches have run.

    Launch it once after an installation, and after a change of model, device or engine flags. It
    waits for the device like any other run.
    """
    measure_engine()


def _metadata(report: CalibrationReport) -> dict[str, dg.MetadataValue]:
    engine = report.runs[0].engine
    metadata: dict[str, dg.MetadataValue] = {
        "engine": dg.MetadataValue.text(
            f"{engine}: made up, says nothing about a real one" if engine == SIMULATED else engine
        ),
        "failed_requests": dg.MetadataValue.int(report.failed),
        "rounds": dg.MetadataValue.table(
            [
                dg.TableRecord(
                    {
                        "requests": run.requests,
                        "at_a_time": run.at_a_time,
                        "prompt_tokens": run.prompt_tokens,
                        "completion_tokens": run.completion_tokens,
                        "seconds": round(run.seconds, 3),
                    }
                )
                for run in report.runs
            ]
        ),
    }
    if report.throughput is not None:
        costs = report.throughput.costs
        metadata |= {
            "seconds_per_1000_prompt_tokens": dg.MetadataValue.float(1000 * costs.prompt_token),
            "seconds_per_1000_completion_tokens": dg.MetadataValue.float(
                1000 * costs.completion_token
            ),
            "seconds_per_request": dg.MetadataValue.float(costs.request),
            "seconds_per_step": dg.MetadataValue.float(costs.step),
        }
    return metadata
