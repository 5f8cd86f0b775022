"""`engine`: the engines that run, used or warm, and how they are ended by hand."""

import click

from batch_orchestration.cli.context import json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.tables import table
from batch_orchestration.core.text import duration
from batch_orchestration.hosting.hosts import RunningEngine, end_engines, running_engines

_COLUMNS = ("Model", "Device", "Memory level", "Pid", "Age", "Runs", "Idle for", "Log")


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def engine(click_context: click.Context, as_json: bool) -> None:
    """Show the engines that run.

    An engine outlives the run that started it and stays warm for BATCH_ENGINE_KEEP_ALIVE seconds
    after the last run, so that the next batch need not wait for its start.
    """
    if click_context.invoked_subcommand is not None:
        return
    context = open_context()
    engines = running_engines(context.folder)
    if as_json:
        print_json(engines)
    elif engines:
        now = context.clock()
        context.console.print(table(_COLUMNS, [_row(each, now) for each in engines]))
    else:
        say("No engine runs.")


@engine.command()
@click.option("--idle", is_flag=True, help="Leave engines alone that a run uses.")
def stop(idle: bool) -> None:
    """End the engines and free their memory; a run that uses one starts it again.

    Exit 1 if one is left that should have ended: it belongs to another user or another version.
    """
    folder = open_context().folder
    before = {each.record.host for each in running_engines(folder)}
    ended = end_engines(folder, only_idle=idle)
    say(f"{ended} {'engine' if ended == 1 else 'engines'} ended.")
    same = [each for each in running_engines(folder) if each.record.host in before]
    if left := [each.record.host.pid for each in same if each.state is None or not idle]:
        pids = ", ".join(map(str, left))
        raise click.ClickException(
            f"engine hosts that could not be ended: {pids}. End them as the user who owns them"
            " (`ps -o user,args -p PID`)."
        )


def _row(engine: RunningEngine, now: float) -> tuple[object, ...]:
    spec, state = engine.record.spec, engine.state
    level = ", ".join(f"{name} {value}" for name, value in spec.memory_level.items())
    known = (spec.model or spec.kind, spec.device, level or "as configured")
    age = duration(max(0.0, now - engine.record.started_at))
    if state is None:
        return (*known, "", age, "", "", f"its host, pid {engine.record.host.pid}, does not answer")
    idle = "" if state.idle_seconds is None else duration(state.idle_seconds)
    return (*known, state.pid, age, state.leases, idle, state.log_path)
