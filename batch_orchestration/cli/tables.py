"""Tables for the terminal: batches, one batch, failures, settings, query results."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batch_orchestration.admission.validation import ValidationReport
from batch_orchestration.cli.watching import describe, eta, figures, halt_lines, waiting
from batch_orchestration.core.dead_letters import DeadLetter
from batch_orchestration.core.lifecycle import BatchEvent
from batch_orchestration.core.outcomes import Failure
from batch_orchestration.core.results import SIMULATED
from batch_orchestration.core.text import duration
from batch_orchestration.dispatch.table import COLUMNS, pause_line, queue_rows
from batch_orchestration.estimates.estimate import Estimate, estimate_rows
from batch_orchestration.queue.entries import QueueView
from batch_orchestration.settings import SettingInForce
from batch_orchestration.status.overview import Overview
from batch_orchestration.status.views import BatchStatusView

MESSAGE_LENGTH = 300
BAR_WIDTH = 12


def batches_table(views: Iterable[BatchStatusView]) -> Table:
    """Return a table with one row per batch."""
    table = _table(
        "Batch", "Status", "", "Done", "Failed", "Tokens/s", "ETA", "Priority", "Created"
    )
    for view in views:
        tokens = f"{view.live.output_tokens_per_second:,.0f}" if view.live else ""
        table.add_row(
            Text(view.batch_id),
            Text(describe(view)),
            ProgressBar(total=max(view.total, 1), completed=view.done, width=BAR_WIDTH),
            f"{view.done:,}/{view.total:,}",
            f"{view.failed:,}",
            tokens,
            eta(view) if view.live else "",
            str(view.options.priority),
            moment(view.plan.created_at),
        )
    return table


def _waits(view: BatchStatusView) -> str:
    """Return the reason why requests of a batch wait, and the time left; empty if none waits."""
    if view.live is None or view.live.waiting is None:
        return ""
    wait = view.live.waiting
    left = max(0.0, wait.until - view.live.updated_at - (view.progress_age or 0.0))
    return f"{waiting(wait)} ({duration(left)} left): {wait.reason}"


def board_tables(overview: Overview) -> Iterator[RenderableType]:
    """Yield a table for each part of the overview that is not empty."""
    if overview.queue and (paused := pause_line(overview.queue)):
        yield Text(paused, style="bold")
    if overview.batches:
        yield batches_table(overview.batches)
    if overview.queue and overview.queue.entries:
        yield queue_table(overview.queue)
    if overview.waiting or overview.claims:
        table = _table("In the inbox", "Why it waits")
        for _, name, reason in overview.waiting:
            table.add_row(Text(name), Text(reason))
        for claim in overview.claims:
            failing = str(claim.attempts) if claim.attempts.failing else ""
            why = failing or "claimed; its run reads it now or waits to"
            table.add_row(Text(claim.file_name), Text(why))
        yield table
    if overview.damaged:
        table = _table("Damaged", "What to do")
        for damage in overview.damaged:
            table.add_row(Text(damage.reason), Text(damage.next_command))
        yield table
    if overview.rejected:
        table = _table("Rejected", "Why", "What to do")
        for rejected in overview.rejected:
            table.add_row(Text(rejected.file_name), Text(rejected.reason), Text(rejected.next_step))
        yield table


def queue_table(view: QueueView) -> Table:
    """Return a table with one row per queue entry, in the order of service."""
    table = _table(*COLUMNS)
    for row in queue_rows(view):
        table.add_row(*(Text(cell) for cell in row))
    return table


def batch_details(
    view: BatchStatusView,
    failures_by_code: dict[str, int],
    events: Sequence[BatchEvent],
    estimate: Estimate | None = None,
) -> RenderableType:
    """Return all details of one batch."""
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
        ("Tokens", f"{view.prompt_tokens:,} prompt, {view.completion_tokens:,} completion"),
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
    parts: list[RenderableType] = [grid]
    if events:
        parts += [Text(), events_table(events)]
    if view.failed:
        hint = f"Failed requests: python -m batch_orchestration failures {view.batch_id}"
        parts.append(Text(hint, style="dim"))
    return Group(*parts)


def events_table(events: Iterable[BatchEvent]) -> Table:
    """Return a table with one row per status that a batch was in."""
    table = _table("Since", "Status", "By", "Why")
    for event in events:
        table.add_row(
            moment(event.at), str(event.to_status), Text(event.actor), Text(shortened(event.reason))
        )
    return table


def failures_table(failures: Iterable[DeadLetter]) -> Table:
    """Return a table with one row per failed request."""
    table = _table("Line", "custom_id", "Code", "HTTP", "Attempts", "State", "Message")
    for letter in failures:
        request, failure = letter.request, letter.request.outcome
        if isinstance(failure, Failure):
            table.add_row(
                str(request.line),
                Text(request.custom_id or ""),
                str(failure.code),
                str(failure.status or ""),
                str(request.attempts),
                str(letter.state),
                Text(shortened(failure.message)),
            )
    return table


def print_validation(console: Console, report: ValidationReport) -> None:
    """Print the result of validating a file."""
    if report.faults:
        table = _table("Line", "custom_id", "Code", "What is wrong")
        for fault in report.faults:
            custom_id = Text(fault.custom_id or "")
            table.add_row(str(fault.line), custom_id, str(fault.code), Text(fault.message))
        console.print(table)
    if report.faults_not_listed:
        console.print(f"… and {report.faults_not_listed:,} more")
    if report.refusal is None:
        console.print(
            f"{report.file_name}: {report.requests:,} requests, {report.faulty:,} of them faulty; "
            f"chunks: {report.chunks:,}",
            highlight=False,
            markup=False,
        )
    if report.estimate is not None:
        for name, text in estimate_rows(report.estimate):
            console.print(f"{name}: {text}", highlight=False, markup=False)


def settings_table(settings: Iterable[SettingInForce]) -> Table:
    """Return a table with one row per setting."""
    table = _table("Setting", "Value", "From", "What it is")
    table.columns[0].no_wrap = True
    for setting in settings:
        style = "" if setting.origin == "default" else "bold"
        table.add_row(
            Text(setting.variable, style),
            Text(setting.value, style),
            setting.origin,
            Text(setting.description),
        )
    return table


def query_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a query's result as a table."""
    table = _table(*columns)
    for row in rows:
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    return table


def moment(posix_seconds: float) -> str:
    """Format a time in the user's time zone."""
    return datetime.fromtimestamp(posix_seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def shortened(text: str) -> str:
    """Return the text on one line, cut at `MESSAGE_LENGTH`."""
    flat = " ".join(text.split())
    return flat if len(flat) <= MESSAGE_LENGTH else flat[: MESSAGE_LENGTH - 1] + "…"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table
