"""The commands. Each reads its arguments, calls a service, and prints a table or JSON."""

from typing import Any

import click

from batch_orchestration import __version__
from batch_orchestration.admission.settings import open_inbox
from batch_orchestration.cli import tables
from batch_orchestration.cli.alerts import alerts
from batch_orchestration.cli.context import Commands, Context, json_option, open_context, print_json
from batch_orchestration.cli.dead_letters import discard, failures, replay
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.estimates import estimates
from batch_orchestration.cli.gpu import gpu
from batch_orchestration.cli.health import health
from batch_orchestration.cli.housekeeping import housekeeping
from batch_orchestration.cli.lifecycle import cancel_batch, resume_queue_or_batch
from batch_orchestration.cli.metrics import metrics
from batch_orchestration.cli.queue import board_picture, pause, show_live
from batch_orchestration.cli.recovering import recover
from batch_orchestration.cli.results import results
from batch_orchestration.cli.submitting import submit, validate
from batch_orchestration.cli.watching import watch_batch
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.files.sharing import keep_from_others
from batch_orchestration.settings import settings_in_force
from batch_orchestration.status.objects import batch_object
from batch_orchestration.status.overview import Overview, read_overview
from batch_orchestration.status.views import view_batch


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Batch inference with vLLM, run by Dagster.

    Settings are BATCH_* variables or lines of .env; `config` lists them. Exit codes: 0 done,
    1 failed, 2 wrong usage. (`health`: 3 degraded.)
    """
    keep_from_others()


main.add_command(submit)
main.add_command(validate)
main.add_command(watch_batch)
main.add_command(failures)
main.add_command(replay)
main.add_command(discard)
main.add_command(recover)
main.add_command(cancel_batch)
main.add_command(resume_queue_or_batch)
main.add_command(results)
main.add_command(gpu)
main.add_command(health)
main.add_command(alerts)
main.add_command(housekeeping)
main.add_command(estimates)
main.add_command(pause)
main.add_command(metrics)


@main.command()
@click.argument("batch_id", metavar="[BATCH]", required=False)
@click.option("--live", is_flag=True, help="Keep showing the board until Ctrl-C.")
@json_option
def status(batch_id: str | None, live: bool, as_json: bool) -> None:
    """Show all batches and the files waiting in the inbox, or one BATCH in full."""
    context = open_context()
    if live and (as_json or batch_id is not None):
        raise click.UsageError("--live shows the whole board; for one batch: watch BATCH")
    if live:
        show_live(context, lambda: board_picture(_read_board(context)))
        return
    if batch_id is None:
        _show_board(context, as_json=as_json)
        return
    view = view_batch(batch_id, folder=context.folder, store=context.store, now=context.clock())
    events = [] if view.store_problem else context.store.batch_events(batch_id)
    if as_json:
        print_json(batch_object(view, folder=context.folder) | {"events": events})
        return
    _say_store_problem(view.store_problem)
    known = not view.store_problem and view.failed
    by_code = context.store.failure_counts(batch_id) if known else {}
    estimate = read_estimate(context.folder, batch_id)
    context.console.print(tables.batch_details(view, by_code, events, estimate))


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
        context.console.print(tables.query_table(columns, rows))


@main.command()
@json_option
def config(as_json: bool) -> None:
    """Print every setting with its value and its source."""
    context = open_context()
    rows = settings_in_force(context.settings)
    if as_json:
        print_json(rows)
    else:
        context.console.print(tables.settings_table(rows))


def _read_board(context: Context) -> Overview:
    return read_overview(
        folder=context.folder,
        store=context.store,
        inbox=open_inbox(context.settings, context.folder),
        now=context.clock(),
    )


def _show_board(context: Context, *, as_json: bool) -> None:
    overview = _read_board(context)
    if as_json:
        print_json(_board_object(overview, context))
        return
    if overview.empty:
        say(
            f"No batches yet in {context.folder.root}.\n"
            "Drop a .jsonl file into its inbox/, or: python -m batch_orchestration submit FILE"
        )
        return
    _say_store_problem(overview.store_problem)
    for table in tables.board_tables(overview):
        context.console.print(table)
    if overview.unread:
        say(
            f"Files wait in {context.folder.inbox}, and no Dagster daemon has ever looked at this"
            " data folder. Start one there where dagster.yaml lies: `make dev`, or `dagster dev`"
            f" with BATCH_DATA_DIR={context.folder.root}"
        )


def _say_store_problem(problem: str | None) -> None:
    if problem:
        say(f"The store cannot be asked now; this is from the runs' files: {problem}", err=True)


def _board_object(overview: Overview, context: Context) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [batch_object(view, folder=context.folder) for view in overview.batches],
        "waiting": [{"path": path, "reason": reason} for path, _, reason in overview.waiting],
        "claims": [
            {"claim_id": c.claim_id, "file_name": c.file_name, "attempts": c.attempts}
            for c in overview.claims
        ],
        "damaged": list(overview.damaged),
        "rejected": list(overview.rejected),
        "store_problem": overview.store_problem,
        "unread": overview.unread,
        "queue": overview.queue,
    }
