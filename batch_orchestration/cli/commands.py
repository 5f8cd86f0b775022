"""The group of all commands. Each reads its arguments, calls a wing, and prints a table or JSON."""

import click

from batch_orchestration import __version__
from batch_orchestration.cli.alerts import alerts
from batch_orchestration.cli.context import Commands, json_option, open_context, print_json
from batch_orchestration.cli.dead_letters import discard, failures, replay
from batch_orchestration.cli.estimates import estimates
from batch_orchestration.cli.gpu import gpu
from batch_orchestration.cli.health import health
from batch_orchestration.cli.hosting import engine
from batch_orchestration.cli.housekeeping import housekeeping
from batch_orchestration.cli.lifecycle import cancel_batch, resume_queue_or_batch
from batch_orchestration.cli.metrics import metrics
from batch_orchestration.cli.queue import pause
from batch_orchestration.cli.recovering import recover
from batch_orchestration.cli.results import results
from batch_orchestration.cli.status import status
from batch_orchestration.cli.submitting import submit, validate
from batch_orchestration.cli.tables import table
from batch_orchestration.cli.watching import watch_batch
from batch_orchestration.files.sharing import keep_from_others
from batch_orchestration.settings import settings_in_force


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Batch inference with vLLM, run by Dagster.

    Settings are BATCH_* variables or lines of .env; `config` lists them. Exit codes: 0 done,
    1 failed, 2 wrong usage. (`health`: 3 degraded.)
    """
    keep_from_others()


@main.command()
@click.argument("sql")
@json_option
def query(sql: str, as_json: bool) -> None:
    """Query the store with read-only SQL; tables: batches, chunks, results, failed_requests.

    Histories: batch_events, dead_letter_events. The view request_outcomes has all answered and
    failed requests with their status. Estimates: estimates, benchmarks, answered_requests,
    engine_facts.
    """
    context = open_context()
    columns, rows = context.store.query(sql)
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        context.console.print(table(columns, rows))


@main.command()
@json_option
def config(as_json: bool) -> None:
    """Print every setting with its value and its source."""
    context = open_context()
    settings = settings_in_force(context.settings)
    if as_json:
        print_json(settings)
        return
    rows = ((one.variable, one.value, one.origin, one.description) for one in settings)
    shown = table(("Setting", "Value", "From", "Meaning"), rows)
    shown.columns[0].no_wrap = True
    context.console.print(shown)


for command in (
    *(submit, validate, status, watch_batch, results, cancel_batch, resume_queue_or_batch, pause),
    *(failures, replay, discard, recover, gpu, engine, health, alerts),
    *(housekeeping, estimates, metrics),
):
    main.add_command(command)
