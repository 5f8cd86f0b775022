"""`pause`, and the live overview of `status --live`."""

from collections.abc import Callable

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from batch_orchestration.cli import tables
from batch_orchestration.cli.context import Context, json_option, open_context, person, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.queue import files as queue_files
from batch_orchestration.queue.entries import Pause
from batch_orchestration.status.overview import Overview

#: Each read of the store briefly blocks its writers.
LOOK_SECONDS = 2.0


@click.command()
@click.option("--reason", default="", help="For those who wonder; shown wherever the queue is.")
@json_option
def pause(reason: str, as_json: bool) -> None:
    """Pause the whole queue: no file is admitted and no run is started.

    Runs at work finish the chunks that they have begun; nothing is lost. `resume` lets the queue go
    on.
    """
    context = open_context()
    context.folder.create()
    paused = Pause(at=context.clock(), actor=person(), reason=reason)
    queue_files.pause(context.folder, paused)
    if as_json:
        print_json(paused)
    else:
        say("The queue is paused. To let it go on: python -m batch_orchestration resume")


def show_live(context: Context, picture: Callable[[], RenderableType]) -> None:
    """Redraw a picture every two seconds until Ctrl-C; without a terminal, print it once."""
    if not context.console.is_terminal:
        context.console.print(picture())
        return
    with Live(picture(), console=context.console, auto_refresh=False, screen=True) as live:
        while True:
            try:
                context.sleep(LOOK_SECONDS)
                live.update(picture(), refresh=True)
            except KeyboardInterrupt:
                return


def board_picture(overview: Overview) -> RenderableType:
    """Return the whole overview as one renderable."""
    if overview.empty:
        return Text("Nothing was dropped yet.")
    problem = overview.store_problem
    head = [Text(f"From the runs' files: {problem}", style="red")] if problem else []
    return Group(*head, *tables.board_tables(overview))
