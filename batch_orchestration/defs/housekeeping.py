"""Housekeeping in Dagster: the job, its schedules, and an entry point for the command line.

The command `housekeeping` starts `python -m batch_orchestration.defs.housekeeping` for Dagster's
parts, because the command line itself does not import Dagster.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import dagster as dg
import msgspec
from dagster._core.instance.config import is_dagster_home_set
from pydantic import Field

from batch_orchestration.defs.housekeeping_in_dagster import chunk_partitions, dagster_parts
from batch_orchestration.defs.job_factory import config_of, one_op_job
from batch_orchestration.defs.metadata import metadata_of, table_of
from batch_orchestration.defs.resources import SettingsResource, data_folder, open_store
from batch_orchestration.lifecycle.clock import DELETION_SECONDS, clock_doubt
from batch_orchestration.operations.housekeeping.clean import (
    Cleanup,
    Part,
    run_cleanup,
)
from batch_orchestration.operations.housekeeping.retention import cleanup_parts
from batch_orchestration.settings import Settings, load_settings
from batch_orchestration.workers.reporter import report_phase

#: Often enough that the key space does not outgrow its bound between two checks.
PARTITIONS_CRON = "47 * * * *"
#: Above this share of the bound, partitions are cleaned between two nights as well.
PARTITIONS_HIGH = 0.95
#: Names in the log of a run; the table has the numbers.
NAMES_SHOWN = 50
PARTITIONS = "partitions"
#: A process that holds the store longer is at work; each part would wait this long.
STORE_SECONDS = 20.0


class HousekeepingConfig(dg.Config):
    """The parts to clean."""

    parts: list[str] = Field([], description="Names of parts; empty for all.")
    dry_run: bool = Field(False, description="Only list the data that would be removed.")


@one_op_job("keep_house_once")
def housekeeping(
    context: dg.OpExecutionContext, config: HousekeepingConfig, settings: SettingsResource
) -> None:
    """Remove data older than the settings allow: journals, samples, logs, runs, partitions.

    Nothing of a batch that has not ended is removed. `housekeeping_schedule` launches the job each
    night; with `dry_run` it only lists the data that it would remove.
    """
    report_phase("cleaning up")
    cleanup = _cleanup(settings, dry_run=config.dry_run)
    report = run_cleanup(
        _chosen([*cleanup_parts(settings), *dagster_parts(context.instance, settings)], config),
        cleanup,
        clock=time.monotonic,
    )
    for part, removals in report.removals.items():
        verb = "would remove" if config.dry_run else "removed"
        names = ", ".join(removal.subject for removal in removals[:NAMES_SHOWN])
        context.log.info(f"{part}: {verb} {len(removals):,}: {names}")
    columns = ("part", "removed", "size_bytes", "seconds", "note")
    context.add_output_metadata(metadata_of(parts=table_of(report.results, *columns)))
    if problems := [f"{r.part}: {r.problem}" for r in report.results if r.problem]:
        raise dg.Failure(description="; ".join(problems), allow_retries=False)


def _cleanup(settings: Settings, *, dry_run: bool) -> Cleanup:
    store = open_store(settings, deadline_seconds=STORE_SECONDS)
    folder = data_folder(settings)
    doubt = clock_doubt(folder, most_seconds=DELETION_SECONDS)
    return Cleanup(folder, store, now=time.time(), dry_run=dry_run, doubt=doubt)


def _chosen(parts: Sequence[Part], config: HousekeepingConfig) -> list[Part]:
    names = {part.name for part in parts}
    if unknown := set(config.parts) - names:
        raise dg.Failure(
            description=f"no parts: {sorted(unknown)}; there are {sorted(names)}",
            allow_retries=False,
        )
    return [part for part in parts if not config.parts or part.name in config.parts]


def schedules(settings: Settings) -> list[dg.ScheduleDefinition]:
    """Return the schedules of housekeeping; none if the settings turn them off."""
    if not settings.housekeeping_cron:
        return []
    nightly = dg.ScheduleDefinition(
        name="housekeeping_schedule",
        job=housekeeping,
        cron_schedule=settings.housekeeping_cron,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Removes data older than the settings allow; see docs/housekeeping.md.",
    )
    return [nightly, partition_schedule]


@dg.schedule(
    job=housekeeping,
    cron_schedule=PARTITIONS_CRON,
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description=(
        "Keeps the key space of `chunks` below BATCH_MAX_CHUNK_PARTITIONS between two nights: "
        "if it is nearly full, removes the partitions of the batches that were delivered first."
    ),
)
def partition_schedule(
    context: dg.ScheduleEvaluationContext, settings: SettingsResource
) -> dg.RunRequest | dg.SkipReason:
    """Request a run only if the key space is nearly full."""
    most = settings.max_chunk_partitions
    count = sum(map(len, chunk_partitions(context.instance).values()))
    if not most or count <= most * PARTITIONS_HIGH:
        return dg.SkipReason(f"{count:,} chunk partitions, of {most:,}" if most else "no bound")
    return dg.RunRequest(run_config=config_of(housekeeping, parts=[PARTITIONS]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run Dagster's parts for the command line; print a `CleanupReport` as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--part", action="append", default=[])
    given = parser.parse_args(arguments)
    settings = load_settings()
    cleanup = _cleanup(settings, dry_run=given.dry_run)
    with _instance() as instance:
        parts = [
            part
            for part in dagster_parts(instance, settings)
            if not given.part or part.name in given.part
        ]
        report = run_cleanup(parts, cleanup, clock=time.monotonic)
    sys.stdout.buffer.write(msgspec.json.encode(report))


@contextlib.contextmanager
def _instance() -> Iterator[dg.DagsterInstance]:
    """Open the instance that `dagster dev` would use in this folder."""
    if is_dagster_home_set():
        with dg.DagsterInstance.get() as instance:
            yield instance
    elif Path("dagster.yaml").exists():
        with dg.DagsterInstance.from_config(str(Path.cwd())) as instance:
            yield instance
    else:
        raise SystemExit("there is no dagster.yaml here, and DAGSTER_HOME is not set")


if __name__ == "__main__":
    main()
