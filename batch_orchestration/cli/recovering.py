"""`recover`: rebuilds a damaged or missing store."""

import click

from batch_orchestration.cli.context import json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.operations import recovery


@click.command()
@click.option("--force", is_flag=True, help="Rebuild the store although it is sound.")
@json_option
def recover(force: bool, as_json: bool) -> None:
    """Rebuild the store (batch.duckdb) from plans and journals.

    The old file is renamed to batch.duckdb.damaged-TIME and never deleted. Runs may go on.
    """
    context = open_context()
    problem = recovery.find_problem(folder=context.folder, store=context.store)
    if problem is None and not force:
        if as_json:
            print_json({"problem": None, "set_aside": None, "batches": []})
        else:
            say("The store is sound and has every batch: nothing to do.")
        return
    done = recovery.recover(
        folder=context.folder, problem=problem or "none; --force was given", clock=context.clock
    )
    if as_json:
        print_json(done)
    else:
        _say(done)
    if not done.complete:
        raise click.ClickException("some parts could not be rebuilt, see above")


def _say(done: recovery.Recovery) -> None:
    say(f"Problem: {done.problem}")
    if done.set_aside:
        say(f"Old file: {done.set_aside}")
    for batch in done.batches:
        say(
            f"{batch.batch_id}: {batch.status or 'not rebuilt'}, {batch.chunks:,} of"
            f" {batch.of_chunks:,} chunks committed ({batch.completed:,} answered,"
            f" {batch.failed:,} failed), {batch.operations:,} replays and discards applied"
        )
        if batch.unfinished:
            say(f"  {batch.unfinished:,} outcomes wait in journals for their chunk's run")
        for problem in batch.problems:
            say(f"  could not be rebuilt: {problem}")
    if not done.batches:
        say("There is no batch; the store is new and empty.")
