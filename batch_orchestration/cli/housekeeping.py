"""`housekeeping`: removes old data, or lists the data that would be removed."""

import subprocess
import sys
import time
from collections.abc import Sequence

import click
import msgspec

from batch_orchestration.cli.context import Context, json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.tables import table
from batch_orchestration.lifecycle.clock import DELETION_SECONDS, clock_doubt
from batch_orchestration.operations.housekeeping.clean import (
    Cleanup,
    CleanupReport,
    PartResult,
    run_cleanup,
)
from batch_orchestration.operations.housekeeping.retention import cleanup_parts

#: These run in another process, because only the definitions import Dagster.
DAGSTER_PARTS = ("partitions", "runs", "ticks")
_PROGRAM = [sys.executable, "-m", "batch_orchestration.defs.housekeeping"]
#: Removed names that are shown per part; `--json` has all.
NAMES_SHOWN = 10


@click.command()
@click.option("--dry-run", is_flag=True, help="Only list the data that would be removed.")
@click.option("--part", "parts", multiple=True, help="Only this part; repeatable.")
@json_option
def housekeeping(dry_run: bool, parts: Sequence[str], as_json: bool) -> None:
    """Remove data that is older than the settings allow, as Dagster does each night.

    Nothing of a batch that has not ended is removed. Partitions and runs are Dagster's: for these,
    run it where dagster.yaml lies, or with DAGSTER_HOME set.
    """
    context = open_context()
    own = cleanup_parts(context.settings)
    known = [*(part.name for part in own), *DAGSTER_PARTS]
    if unknown := [name for name in parts if name not in known]:
        raise click.UsageError(f"no part {unknown[0]!r}; there are {', '.join(known)}")
    chosen = parts or known
    doubt = clock_doubt(context.folder, most_seconds=DELETION_SECONDS)
    cleanup = Cleanup(
        context.folder, context.store, now=context.clock(), dry_run=dry_run, doubt=doubt
    )
    report = run_cleanup(
        [part for part in own if part.name in chosen], cleanup, clock=time.monotonic
    )
    if theirs := [name for name in DAGSTER_PARTS if name in chosen]:
        report = _joined(report, _ask_dagster(theirs, context, dry_run=dry_run))
    if as_json:
        print_json(report)
    else:
        _show(report, context, dry_run=dry_run)
    if any(result.problem for result in report.results):
        raise click.ClickException("some parts failed, see above")


def _ask_dagster(parts: Sequence[str], context: Context, *, dry_run: bool) -> CleanupReport:
    flags = [flag for part in parts for flag in ("--part", part)] + ["--dry-run"] * dry_run
    done = subprocess.run([*_PROGRAM, *flags], capture_output=True, check=False)
    try:
        return msgspec.json.decode(done.stdout, type=CleanupReport)
    except msgspec.DecodeError:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        problem = lines[-1] if lines else f"ended with exit code {done.returncode}"
        at = context.clock()
        return CleanupReport(
            results=tuple(PartResult(part=part, at=at, problem=problem) for part in parts)
        )


def _joined(one: CleanupReport, other: CleanupReport) -> CleanupReport:
    return CleanupReport(
        results=(*one.results, *other.results), removals={**one.removals, **other.removals}
    )


def _show(report: CleanupReport, context: Context, *, dry_run: bool) -> None:
    rows = [
        (result.part, "", "", result.note)
        if result.off
        else (result.part, f"{result.removed:,}", f"{result.size_bytes:,}", result.note)
        for result in report.results
    ]
    columns = ("Part", "To be removed" if dry_run else "Removed", "Bytes", "")
    context.console.print(table(columns, rows))
    for part, removals in report.removals.items():
        say(f"\n{part}:")
        for removal in removals[:NAMES_SHOWN]:
            say(f"  {removal.subject}  {removal.size_bytes:,} bytes")
        if len(removals) > NAMES_SHOWN:
            say(f"  and {len(removals) - NAMES_SHOWN:,} more (all of them: --json)")
