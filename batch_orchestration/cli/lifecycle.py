"""`cancel` and `resume`: ending a batch early, and going on with it."""

import click

from batch_orchestration.cli.context import json_option, open_context, person, print_json
from batch_orchestration.services.closing import cancel
from batch_orchestration.services.resuming import resume

_batch = click.argument("batch_id", metavar="BATCH")
_reason = click.option("--reason", default="", help="Why; kept in the batch's history and report.")


@click.command("cancel")
@_batch
@_reason
@json_option
def cancel_batch(batch_id: str, reason: str, as_json: bool) -> None:
    """Stop BATCH: what is answered is delivered, the rest fails as `batch_cancelled`.

    The run at work on it lets go of its requests within seconds; the files follow. Exit 1 if there
    is nothing left to cancel.
    """
    context = open_context()
    cancellation = cancel(
        batch_id,
        folder=context.folder,
        store=context.store,
        actor=person(),
        reason=reason,
        at=context.clock(),
    )
    if as_json:
        print_json(
            {
                "batch_id": batch_id,
                "closing": cancellation.closing,
                "earlier": cancellation.earlier,
                "over": cancellation.over,
            }
        )
    elif cancellation.over:
        click.echo(f"{batch_id} is {cancellation.closing} already.")
    elif cancellation.earlier:
        click.echo(f"{batch_id} is being cancelled already: {cancellation.closing}")
    else:
        click.echo(
            f"{batch_id} is being cancelled. What is answered is delivered as soon as its run has\n"
            f"stopped: python -m batch_orchestration watch {batch_id}"
        )


@click.command("resume")
@_batch
@click.option(
    "--completion-window",
    metavar="DURATION",
    help="A new one, counted from now, like 24h; an expired batch needs it.",
)
@_reason
@json_option
def resume_batch(batch_id: str, completion_window: str | None, reason: str, as_json: bool) -> None:
    """Go on with BATCH, which was cancelled or has expired: only what has no answer is asked.

    Its output files are made anew when everything is answered.
    """
    context = open_context()
    try:
        resumption = resume(
            batch_id,
            folder=context.folder,
            store=context.store,
            actor=person(),
            reason=reason,
            completion_window=completion_window,
            at=context.clock(),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        print_json({"batch_id": batch_id, "resumption": resumption})
    else:
        click.echo(
            f"{batch_id} goes on as soon as the engine is free: python -m batch_orchestration"
            f" watch {batch_id}"
        )
