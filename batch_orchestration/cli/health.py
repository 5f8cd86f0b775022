"""`health`: whether the deployment is healthy; if not, the reasons and the next commands."""

from collections.abc import Iterator, Sequence

import click
from rich.text import Text

from batch_orchestration.cli.context import json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.tables import table
from batch_orchestration.core.text import duration
from batch_orchestration.operations.health.examine import examine_health
from batch_orchestration.operations.health.report import HealthReport, Level

#: Commands that fail also exit with 1, so a failed examination never counts as healthy. 2 is wrong
#: usage everywhere.
EXIT_CODES = {Level.HEALTHY: 0, Level.DEGRADED: 3, Level.UNHEALTHY: 1}
_STYLES = {Level.HEALTHY: "green", Level.DEGRADED: "yellow", Level.UNHEALTHY: "bold red"}


@click.command()
@json_option
def health(as_json: bool) -> None:
    """Show whether the deployment is healthy: exit code 0 healthy, 3 degraded, 1 unhealthy.

    Examines Dagster's daemon, the store, the disk, the queue, the runs, the engine and the GPU;
    needs none of them. A part that cannot be examined is not healthy. Each reason has a next
    command.
    """
    context = open_context()
    report = examine_health(settings=context.settings, folder=context.folder, now=context.clock())
    if as_json:
        print_json(_object(report))
    else:
        context.console.print(table(("Check", "Level", "Reason", "Next"), _rows(report)))
        problems = ", ".join(finding.check for finding in report.problems)
        say(f"{report.level.word}: {problems}" if problems else report.level.word)
    click.get_current_context().exit(EXIT_CODES[report.level])


def _object(report: HealthReport) -> dict[str, object]:
    findings = [finding.to_json() for finding in report.findings]
    return {"level": report.level.word, "at": report.at, "findings": findings}


def _rows(report: HealthReport) -> Iterator[Sequence[object]]:
    for finding in sorted(report.findings, key=lambda finding: -finding.level):
        reason = finding.reason
        if finding.since is not None and report.at > finding.since:
            reason += f" (for {duration(report.at - finding.since)})"
        level = Text(finding.level.word, style=_STYLES[finding.level])
        yield finding.check, level, reason, finding.next_command
