"""Following a batch: polls it and shows the changes."""

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batch_orchestration.cli.context import Context, json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.text import duration
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.halts import what_helps
from batch_orchestration.status.objects import batch_object
from batch_orchestration.status.views import BatchStatusView, view_batch, with_progress
from batch_orchestration.store.store import Store
from batch_orchestration.workers.progress import Wait

LOOK_SECONDS = 1.0
#: Each read of the store briefly blocks its writers; reading a progress file blocks nothing.
STORE_SECONDS = 4.0
#: Between two lines where there is no terminal to draw on.
LINE_SECONDS = 5.0

Show = Callable[[BatchStatusView], None]


@click.command("watch")
@click.argument("batch_id", metavar="BATCH")
@json_option
def watch_batch(batch_id: str, as_json: bool) -> None:
    """Show the progress of BATCH until it ends; exit 0 if it is completed, else 1.

    Interrupting this command does not stop the batch. With --json, each poll prints a line of JSON.
    """
    finish(follow_shown(batch_id, open_context(), as_json=as_json), as_json=as_json)


def follow_shown(batch_id: str, context: Context, *, as_json: bool = False) -> BatchStatusView:
    """Follow a batch on the terminal, or as JSON lines; return its final view."""

    def look(show: Show) -> BatchStatusView:
        return follow(
            batch_id,
            folder=context.folder,
            store=context.store,
            show=show,
            clock=context.clock,
            sleep=context.sleep,
        )

    if as_json:
        return look(lambda view: print_json(batch_object(view, folder=context.folder), lines=True))
    with display(context.console, clock=context.clock) as show:
        return look(show)


def finish(view: BatchStatusView, *, as_json: bool) -> None:
    """Print the paths of the output files, and end the command with the batch's result.

    Raises:
        ClickException: The batch is not completed.
    """
    if view.output_file and not as_json:
        say(f"Output: {view.output_file}\nErrors: {view.error_file}")
    if view.status is not BatchStatus.COMPLETED:
        raise click.ClickException(_how_it_ended(view))


def _how_it_ended(view: BatchStatusView) -> str:
    if view.early_end is None:
        return f"batch {view.batch_id} ended as {view.status}"
    return (
        f"batch {view.batch_id} ended as {view.early_end}. {view.completed:,} of {view.total:,}"
        f" requests are answered; `resume {view.batch_id}` sends the rest"
    )


def follow(
    batch_id: str,
    *,
    folder: DataFolder,
    store: Store,
    show: Show,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> BatchStatusView:
    """Show a batch until it has ended; return its final view.

    Raises:
        BatchNotFound: There is no such batch.
    """
    view = view_batch(batch_id, folder=folder, store=store, now=clock())
    store_asked_at = clock()
    show(view)
    # Without the store, `final` is only a guess.
    while not view.final or view.store_problem:
        sleep(LOOK_SECONDS)
        if clock() - store_asked_at >= STORE_SECONDS:
            view = view_batch(batch_id, folder=folder, store=store, now=clock())
            store_asked_at = clock()
        else:
            view = with_progress(view, folder=folder, now=clock())
        show(view)
    return view


@contextlib.contextmanager
def display(console: Console, *, clock: Callable[[], float]) -> Iterator[Show]:
    """Yield the function that shows a view: a live bar on a terminal, else periodic lines."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            yield lambda view: live.update(live_panel(view))
    else:
        yield _line_printer(console, clock)


def live_panel(view: BatchStatusView) -> RenderableType:
    """Return the live picture of a batch: its activity, its progress and its rates."""
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    amiss = view.early_end or view.halt or view.status is BatchStatus.FAILED
    colour = "red" if amiss else "green"
    bar.add_row(
        ProgressBar(total=max(view.total, 1), completed=view.done, complete_style=colour),
        f"{view.done:,}/{view.total:,}",
    )
    return Group(
        Text.assemble((view.batch_id, "bold"), "  ", describe(view)),
        bar,
        Text("  ".join(figures(view)), style="dim"),
        *(Text(line) for line in halt_lines(view)),
    )


def halt_lines(view: BatchStatusView) -> list[str]:
    """Return examples of the failures of a paused batch, and the next step."""
    if view.halt is None:
        return []
    examples = [f"{one.custom_id}: {one.code}: {one.message}" for one in view.halt.examples]
    return [*examples, f"To go on: {what_helps(view.batch_id)}"]


def describe(view: BatchStatusView) -> str:
    """Return the present activity of a batch in a few words."""
    if view.final:
        return str(view.status)
    if view.early_end:
        return f"{view.status}: {view.early_end}; answers so far are being delivered"
    if view.halt:
        return f"{view.status}: {view.halt}"
    if view.live:
        waits = f"; {waiting(view.live.waiting)}" if view.live.waiting else ""
        return f"{view.status}: {view.live.phase}{waits}"
    if view.silent_seconds and view.progress:
        return (
            f"{view.status}: its run (pid {view.progress.pid}) has not reported for "
            f"{duration(view.silent_seconds)}"
        )
    if view.status is BatchStatus.IN_PROGRESS:
        waits_for = "its output to be assembled" if view.done == view.total else "a run"
        return f"{view.status}: waiting for {waits_for}"
    return str(view.status)


def waiting(wait: Wait) -> str:
    """Return how many requests the engine has asked to wait, and when the first continues."""
    until = datetime.fromtimestamp(wait.until).astimezone()
    return f"{wait.requests:,} wait as the engine asked, the first until {until:%H:%M:%S}"


def figures(view: BatchStatusView) -> list[str]:
    """Return the number of failures, and of a run at work its rates and ETA."""
    texts = [f"{view.failed:,} failed"]
    if view.live and (view.live.in_flight or view.live.requests_per_second):
        texts += [
            f"{view.live.in_flight:,} in flight",
            f"{view.live.requests_per_second:,.1f} requests/s",
            f"{view.live.output_tokens_per_second:,.0f} tokens/s",
            f"ETA {eta(view)}",
        ]
    if view.store_problem:
        texts.append("store locked: counts may be behind")
    return texts


def eta(view: BatchStatusView) -> str:
    """Return the time until the batch is done as a duration; `?` if unknown."""
    if view.live is None or view.live.eta_seconds is None:
        return "?"
    seconds = view.live.eta_seconds
    return f"{seconds:.0f} s" if seconds < 60 else duration(seconds)


def _line_printer(console: Console, clock: Callable[[], float]) -> Show:
    printed_at, printed_status = float("-inf"), ""

    def show(view: BatchStatusView) -> None:
        nonlocal printed_at, printed_status
        if clock() - printed_at < LINE_SECONDS and f"{view.status}{view.halt}" == printed_status:
            return
        printed_at = clock()
        moment = datetime.fromtimestamp(printed_at).astimezone().strftime("%H:%M:%S")
        news = halt_lines(view) if f"{view.status}{view.halt}" != printed_status else []
        parts = [moment, view.batch_id, describe(view), f"{view.done:,}/{view.total:,}"]
        console.print("  ".join(parts + figures(view)), soft_wrap=True, highlight=False)
        for line in news:
            console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
        printed_status = f"{view.status}{view.halt}"

    return show
