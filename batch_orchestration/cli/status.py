"""`status`: all batches and waiting files, or one batch in full."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.cli.context import Context, json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.tables import moment, shortened, table
from batch_orchestration.cli.watching import describe, eta, figures, halt_lines, waiting
from batch_orchestration.core.lifecycle import BatchEvent
from batch_orchestration.core.results import SIMULATED
from batch_orchestration.core.text import duration
from batch_orchestration.dispatch.table import COLUMNS, pause_line, queue_rows
from batch_orchestration.estimates.batch_estimates import read_estimate
from batch_orchestration.estimates.estimate import Estimate, estimate_rows
from batch_orchestration.status.objects import batch_object
from batch_orchestration.status.overview import Overview, read_overview
from batch_orchestration.status.views import BatchStatusView, view_batch

BAR_WIDTH = 12
#: Each read of the store briefly blocks its writers.
REFRESH_SECONDS = 2.0


@click.command()
@click.argument("batch_id", metavar="[BATCH]", required=False)
@click.option("--live", is_flag=True, help="Keep showing the overview until Ctrl-C.")
@json_option
def status(batch_id: str | None, live: bool, as_json: bool) -> None:
    """Show all batches and the files waiting in the inbox, or one BATCH in full."""
    context = open_context()
    if live and (as_json or batch_id is not None):
        raise click.UsageError("--live shows the whole overview; for one batch: watch BATCH")
    if live:
        _show_live(context)
    elif batch_id is None:
        _show_overview(context, as_json=as_json)
    else:
        _show_batch(context, batch_id, as_json=as_json)


def _read(context: Context) -> Overview:
    return read_overview(
        folder=context.folder,
        store=context.store,
        inbox=Inbox(context.folder, context.settings),
        now=context.clock(),
    )


def _show_live(context: Context) -> None:
    """Redraw the overview every two seconds until Ctrl-C; without a terminal, print it once."""
    if not context.console.is_terminal:
        context.console.print(_picture(_read(context)))
        return
    picture = _picture(_read(context))
    with Live(picture, console=context.console, auto_refresh=False, screen=True) as live:
        while True:
            try:
                context.sleep(REFRESH_SECONDS)
                live.update(_picture(_read(context)), refresh=True)
            except KeyboardInterrupt:
                return


def _picture(overview: Overview) -> RenderableType:
    if overview.empty:
        return Text("Nothing was dropped yet.")
    problem = overview.store_problem
    head = [Text(_from_files(problem), style="red")] if problem else []
    return Group(*head, *_parts(overview))


def _show_overview(context: Context, *, as_json: bool) -> None:
    overview = _read(context)
    if as_json:
        print_json(_overview_object(overview, context))
        return
    if overview.empty:
        say(
            f"No batches yet in {context.folder.root}.\n"
            "Drop a .jsonl file into its inbox/, or: python -m batch_orchestration submit FILE"
        )
        return
    if overview.store_problem:
        say(_from_files(overview.store_problem), err=True)
    for part in _parts(overview):
        context.console.print(part)
    if overview.unread:
        say(
            f"Files wait in {context.folder.inbox}, and no Dagster daemon has ever used this data"
            " folder. Start one in the folder of dagster.yaml: `make dev`, or `dagster dev`"
            f" with BATCH_DATA_DIR={context.folder.root}"
        )


def _show_batch(context: Context, batch_id: str, *, as_json: bool) -> None:
    view = view_batch(batch_id, folder=context.folder, store=context.store, now=context.clock())
    events = [] if view.store_problem else context.store.batch_events(batch_id)
    if as_json:
        print_json(batch_object(view, folder=context.folder) | {"events": events})
        return
    if view.store_problem:
        say(_from_files(view.store_problem), err=True)
    known = not view.store_problem and view.failed
    by_code = context.store.failure_counts(batch_id) if known else {}
    estimate = read_estimate(context.folder, batch_id)
    context.console.print(_details(view, by_code, estimate))
    if events:
        context.console.print(Text(), _history(events))
    if view.failed:
        hint = f"Failed requests: python -m batch_orchestration failures {batch_id}"
        context.console.print(Text(hint, style="dim"))


def _from_files(problem: str) -> str:
    return f"The store cannot be read now; this is from the runs' files: {problem}"


def _overview_object(overview: Overview, context: Context) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [batch_object(view, folder=context.folder) for view in overview.batches],
        "waiting": [{"path": path, "reason": reason} for path, _, reason in overview.waiting],
        "claims": [
            {"claim_id": c.claim_id, "file_name": c.file_name, "attempts": c.attempts}
            for c in overview.claims
        ],
        "damaged": overview.damaged,
        "rejected": overview.rejected,
        "store_problem": overview.store_problem,
        "unread": overview.unread,
        "queue": overview.queue,
    }


def _parts(overview: Overview) -> Iterator[RenderableType]:
    """Yield a table for each part of the overview that is not empty."""
    if overview.queue and (paused := pause_line(overview.queue)):
        yield Text(paused, style="bold")
    if overview.batches:
        yield _batches(overview.batches)
    if overview.queue and overview.queue.entries:
        yield table(COLUMNS, queue_rows(overview.queue))
    if overview.waiting or overview.claims:
        rows = [(name, reason) for _, name, reason in overview.waiting]
        at_work = "claimed; its run reads it now, or waits to"
        rows += [
            (c.file_name, str(c.attempts) if c.attempts.failing else at_work)
            for c in overview.claims
        ]
        yield table(("In the inbox", "Why it waits"), rows)
    if overview.damaged:
        yield table(
            ("Damaged", "What to do"), ((one.reason, one.next_command) for one in overview.damaged)
        )
    if overview.rejected:
        yield table(
            ("Rejected", "Why", "What to do"),
            ((one.file_name, one.reason, one.next_step) for one in overview.rejected),
        )


def _batches(views: Iterable[BatchStatusView]) -> Table:
    return table(
        ("Batch", "Status", "", "Done", "Failed", "Tokens/s", "ETA", "Priority", "Created"),
        (
            (
                view.batch_id,
                describe(view),
                ProgressBar(total=max(view.total, 1), completed=view.done, width=BAR_WIDTH),
                f"{view.done:,}/{view.total:,}",
                f"{view.failed:,}",
                f"{view.live.output_tokens_per_second:,.0f}" if view.live else "",
                eta(view) if view.live else "",
                view.options.priority,
                moment(view.plan.created_at),
            )
            for view in views
        ),
    )


def _details(
    view: BatchStatusView, failures_by_code: dict[str, int], estimate: Estimate | None
) -> Table:
    """Return all details of one batch, a row each; a row without a value is left out."""
    simulated = view.engine == SIMULATED
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    rows = [
        ("Batch", view.batch_id),
        ("Status", describe(view)),
        ("Ended early", str(view.early_end or "")),
        ("Paused", "\n".join(halt_lines(view))),
        ("File", view.plan.file_name),
        ("Requests", f"{view.total:,}: {view.completed:,} answered, {view.failed:,} failed, "
                     f"{view.total - view.done:,} pending"),
        ("Run", "  ".join(figures(view)) if view.live else ""),
        ("Waits", _waits(view)),
        ("Tokens", "{:,} prompt, {:,} completion".format(*view.tokens)),
        ("Failures", ", ".join(f"{code} {count:,}" for code, count in failures_by_code.items())),
        ("Engine", f"{view.engine}: answers are made up" if simulated else view.engine),
        ("Model", view.model),
        ("Chunks", f"{len(view.plan.chunks):,}"),
        ("Priority", str(view.options.priority)),
        ("Window", f"{view.options.completion_window}, until {moment(view.deadline)}"),
        ("Metadata", ", ".join(f"{key}={text}" for key, text in view.options.metadata.items())),
        *(() if estimate is None else estimate_rows(estimate)),
        ("Created", moment(view.plan.created_at)),
        ("Output", str(view.output_file or "")),
        ("Errors", str(view.error_file or "")),
        ("Report", str(view.output_file.with_name("report.md")) if view.output_file else ""),
    ]  # fmt: skip
    for name, value in rows:
        if value:
            grid.add_row(name, Text(value))
    return grid


def _waits(view: BatchStatusView) -> str:
    """Return the reason why requests of a batch wait, and the time left; empty if none waits."""
    if view.live is None or view.live.waiting is None:
        return ""
    wait = view.live.waiting
    left = max(0.0, wait.until - view.live.updated_at - (view.progress_age or 0.0))
    return f"{waiting(wait)} ({duration(left)} left): {wait.reason}"


def _history(events: Sequence[BatchEvent]) -> Table:
    return table(
        ("Since", "Status", "By", "Why"),
        (
            (moment(event.at), event.to_status, event.actor, shortened(event.reason))
            for event in events
        ),
    )
