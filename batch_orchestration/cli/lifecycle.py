"""`cancel` and `resume`: end a batch early, and resume a batch or the whole queue."""

import click

from batch_orchestration.cli.context import Context, json_option, open_context, person, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.lifecycle.cancellation import cancel
from batch_orchestration.lifecycle.resumption import resume
from batch_orchestration.queue import pause as queue_pause

_reason = click.option("--reason", default="", help="Why; kept in the batch's history and report.")


@click.command("cancel")
@click.argument("batch_id", metavar="BATCH")
@_reason
@json_option
def cancel_batch(batch_id: str, reason: str, as_json: bool) -> None:
    """Stop BATCH: its answers are delivered, the other requests fail as `batch_cancelled`.

    The run at work on it drops its requests within seconds; the files follow. Exit 1 if there is
    nothing left to cancel.
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
                "early_end": cancellation.early_end,
                "earlier": cancellation.earlier,
                "over": cancellation.over,
            }
        )
    elif cancellation.over:
        say(f"{batch_id} has already been {cancellation.early_end}")
    elif cancellation.earlier:
        say(f"{batch_id} is already being cancelled: {cancellation.early_end}")
    else:
        say(
            f"{batch_id} is being cancelled. Its answers are delivered as soon as its run has\n"
            f"stopped: python -m batch_orchestration watch {batch_id}"
        )


@click.command("resume")
@click.argument("batch_id", metavar="[BATCH]", required=False)
@click.option(
    "--completion-window",
    metavar="DURATION",
    help="A new window, counted from now, like 24h; an expired batch needs it.",
)
@click.option(
    "--max-failure-rate",
    type=click.FloatRange(0, 1),
    help="A new limit, 0 to 1, for the remaining requests; 1 never pauses the batch again.",
)
@_reason
@json_option
def resume_queue_or_batch(
    batch_id: str | None,
    completion_window: str | None,
    max_failure_rate: float | None,
    reason: str,
    as_json: bool,
) -> None:
    """Continue BATCH, which is paused, cancelled or expired.

    Only requests without an answer are sent. The output files are written again when every request
    is answered. Without BATCH, the queue continues after `pause`.
    """
    context = open_context()
    if batch_id is None:
        if completion_window or reason or max_failure_rate is not None:
            raise click.UsageError("without BATCH, --json is the only option")
        _resume_queue(context, as_json=as_json)
        return
    try:
        resumption = resume(
            batch_id,
            folder=context.folder,
            store=context.store,
            actor=person(),
            reason=reason,
            completion_window=completion_window,
            max_failure_rate=max_failure_rate,
            at=context.clock(),
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        print_json({"batch_id": batch_id, "resumption": resumption})
    else:
        say(
            f"{batch_id} continues as soon as the engine is free: python -m batch_orchestration"
            f" watch {batch_id}"
        )


def _resume_queue(context: Context, *, as_json: bool) -> None:
    before = queue_pause.unpause(context.folder)
    if as_json:
        print_json({"was_paused": before is not None})
    elif before is None:
        say("The queue was not paused.")
    else:
        say(f"The queue continues; {before.actor} had paused it.")
