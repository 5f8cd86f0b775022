"""`pause`: stops admission and new runs; `resume` is in `lifecycle`."""

import click

from batch_orchestration.cli.context import json_option, open_context, person, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.queue import pause as queue_pause
from batch_orchestration.queue.entries import Pause


@click.command()
@click.option("--reason", default="", help="Shown wherever the queue is.")
@click.option("--release-gpu", is_flag=True, help="End engines as soon as no run uses them.")
@json_option
def pause(reason: str, release_gpu: bool, as_json: bool) -> None:
    """Pause the whole queue: no file is admitted and no run is started.

    Runs at work finish the chunks that they have begun; nothing is lost. `resume` lets the queue go
    on. Without --release-gpu, the engine stays warm for BATCH_ENGINE_KEEP_ALIVE seconds.
    """
    context = open_context()
    context.folder.create()
    paused = Pause(at=context.clock(), actor=person(), reason=reason, release_gpu=release_gpu)
    queue_pause.pause(context.folder, paused)
    if as_json:
        print_json(paused)
    else:
        say("The queue is paused. To let it go on: python -m batch_orchestration resume")
