"""Health in Dagster: a sensor that examines it, and an asset check that shows the findings."""

import time
from typing import Any

import dagster as dg

from batch_orchestration.core.errors import StorageError
from batch_orchestration.defs.queue import QUEUE_KEY
from batch_orchestration.defs.resources import SettingsResource, data_folder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.health.examine import examine_health
from batch_orchestration.operations.health.report import HealthReport, Level

INTERVAL_SECONDS = 30
#: More would not be read.
SHOWN_PROBLEMS = 10
_CHECK = "deployment_is_healthy"


@dg.asset_check(asset=QUEUE_KEY, name=_CHECK)
def deployment_is_healthy(settings: SettingsResource) -> dg.AssetCheckResult:
    """Daemon, store, disk, queue, runs, engine and GPU are healthy; no batch waits for a person.

    `health_sensor` examines them every half minute and reports changes here.

    **If it fails**, each reason comes with the next command; `python -m batch_orchestration health`
    prints the same on a terminal, even while Dagster is down.
    """
    report = examine_health(settings=settings, folder=data_folder(settings), now=time.time())
    return dg.AssetCheckResult(**_result(report))


@dg.sensor(
    minimum_interval_seconds=INTERVAL_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Examines the deployment's health every half minute and writes `health.json`. Each tick "
        "shows the findings; a change is reported to the check `deployment_is_healthy` of "
        "`queue_overview`. Starts no runs."
    ),
)
def health_sensor(context: dg.SensorEvaluationContext, settings: SettingsResource) -> dg.SkipReason:
    """Examine the health, write the report, and notify Dagster of a change."""
    folder = data_folder(settings)
    report = examine_health(settings=settings, folder=folder, now=time.time())
    try:
        before = StateFile(folder.health, HealthReport).read()
    except StorageError:
        before = None
    if before is None or before.problem_levels() != report.problem_levels():
        context.instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(asset_key=QUEUE_KEY, check_name=_CHECK, **_result(report))
        )
    try:
        StateFile(folder.health, HealthReport).write(report)
    except StorageError as error:
        return dg.SkipReason(f"{report.summary}; health.json cannot be written: {error}")
    return dg.SkipReason(report.summary)


def _result(report: HealthReport) -> dict[str, Any]:
    """Return the fields that the check's results and evaluations share."""
    is_error = report.level is Level.UNHEALTHY
    return {
        "passed": report.level is Level.HEALTHY,
        "severity": dg.AssetCheckSeverity.ERROR if is_error else dg.AssetCheckSeverity.WARN,
        "description": report.summary,
        "metadata": _metadata(report),
    }


def _metadata(report: HealthReport) -> dict[str, dg.MetadataValue]:
    rows = ["| check | level | reason | next |", "|---|---|---|---|"]
    for finding in sorted(report.findings, key=lambda finding: -finding.level):
        cells = (finding.check, finding.level.word, finding.reason, finding.next_command or "")
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    shown = {
        finding.check: dg.MetadataValue.text(f"{finding.reason}. Next: {finding.next_command}")
        for finding in report.problems[:SHOWN_PROBLEMS]
    }
    return {
        **shown,
        "level": dg.MetadataValue.text(report.level.word),
        "findings": dg.MetadataValue.md("\n".join(rows)),
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
