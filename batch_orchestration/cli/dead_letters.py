"""`failures`, `replay` and `discard`: the commands for failed requests."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.table import Table

from batch_orchestration.admission.reading.lines import model_required
from batch_orchestration.cli.context import Context, json_option, open_context, person, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.tables import shortened, table
from batch_orchestration.core import foreign_json
from batch_orchestration.core.dead_letters import (
    UNRESOLVED,
    DeadLetter,
    DeadLetterState,
    Replay,
    Selection,
)
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.dead_letters import actions as dead_letters
from batch_orchestration.store.operations import open_replays

SHOWN_AT_FIRST = 50
LOOK_SECONDS = 1.0

_DEAD = (DeadLetterState.DEAD,)


def selecting(
    *states: DeadLetterState, state_help: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options for a selection, passed as `selection`.

    Args:
        states: The choices of `--state`; without any there is no such option. A selection has no
            states unless the option is used.
    """
    options = [
        click.argument("batch_id", metavar="BATCH"),
        click.option(
            "--code",
            "codes",
            multiple=True,
            type=click.Choice([str(code) for code in FailureCode]),
            metavar="CODE",
            help="Only failures with this code; repeatable.",
        ),
        click.option(
            "--custom-id", "custom_ids", multiple=True, help="Only this request; repeatable."
        ),
        click.option("--limit", type=click.IntRange(min=1), help="Maximum number of requests."),
    ]
    if states:
        choice = click.Choice([str(state) for state in states])
        options.append(
            click.option("--state", "states", multiple=True, type=choice, help=state_help)
        )

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def selected(
            codes: Sequence[str],
            custom_ids: Sequence[str],
            limit: int | None,
            states: Sequence[str] = (),
            **others: Any,
        ) -> None:
            selection = Selection(
                codes=tuple(map(FailureCode, codes)),
                custom_ids=tuple(custom_ids),
                states=tuple(map(DeadLetterState, states)),
                limit=limit,
            )
            command(selection=selection, **others)

        for option in reversed(options):
            selected = option(selected)
        return selected

    return add


def _in_states(selection: Selection, default: tuple[DeadLetterState, ...]) -> Selection:
    return msgspec.structs.replace(selection, states=selection.states or default)


@click.command()
@selecting(*DeadLetterState, state_help="Only failures in this state; repeatable.")
@click.option(
    "--as-input",
    "as_input",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write their original lines to a new batch file; default: of dead ones.",
)
@click.option(
    "--include-faulty", is_flag=True, help="Also lines that never were requests (--as-input)."
)
@json_option
def failures(
    batch_id: str,
    selection: Selection,
    as_input: Path | None,
    include_faulty: bool,
    as_json: bool,
) -> None:
    """List the failed requests of BATCH in input order, with codes and messages.

    While the batch runs, only failures in committed chunks are listed. Failures that a replay has
    answered are listed with --state resolved.
    """
    context = open_context()
    context.folder.read_plan(batch_id)
    context.store.batch(batch_id)
    if as_input is not None:
        dead = _in_states(selection, _DEAD)
        _write_input(batch_id, dead, as_input, context, include_faulty, as_json=as_json)
        return
    selection = _in_states(selection, UNRESOLVED)
    shown = selection.limit or (None if as_json else SHOWN_AT_FIRST)
    found = context.store.dead_letters(batch_id, msgspec.structs.replace(selection, limit=shown))
    if as_json:
        print_json([_object(letter) for letter in found])
        return
    if not found:
        which = "" if selection == Selection(states=UNRESOLVED) else " of this selection"
        say(f"No request{which} of {batch_id} has failed.")
        return
    context.console.print(_table(found))
    everything = msgspec.structs.replace(selection, limit=None)
    count = len(context.store.dead_letter_codes(batch_id, everything))
    if count > len(found):
        say(f"{count - len(found):,} more: --limit {count} shows all.")


@click.command()
@selecting()
@click.option("--max-tokens", type=click.IntRange(min=1), help="New token limit of each request.")
@click.option("--model", help="Served model that answers.")
@click.option(
    "--set", "fields", multiple=True, metavar="FIELD=JSON", help="Another field of the body."
)
@click.option("--force", is_flag=True, help="Run even if settings differ from the batch's.")
@click.option("--wait", is_flag=True, help="Wait until the replay has ended.")
@json_option
def replay(
    batch_id: str,
    selection: Selection,
    max_tokens: int | None,
    model: str | None,
    fields: tuple[str, ...],
    force: bool,
    wait: bool,
    as_json: bool,
) -> None:
    """Send failed requests of BATCH to the engine again; answers move to its output file.

    This command only records the replay, and Dagster runs it (`replay_sensor`, job
    `replay_failed_requests`): two engines on one device would take each other's memory, and only
    Dagster's pool `gpu` knows whether the device is free. The replay is kept on disk, so Dagster
    need not be running now.
    """
    context = open_context()
    given = {"max_tokens": max_tokens, "model": model}
    overrides = {name: value for name, value in given.items() if value is not None}
    asked = dead_letters.request_replay(
        batch_id,
        _in_states(selection, _DEAD),
        folder=context.folder,
        store=context.store,
        actor=person(),
        at=context.clock(),
        overrides=overrides | _fields(fields),
        model_required=model_required(context.settings),
        force=force,
    )
    if not as_json:
        _say_left_out(asked.left_out)
        names = ", ".join(str(replay.number) for replay in asked.replays)
        say(f"{asked.requests:,} requests wait for the engine, as replay {names}.")
        say("A running Dagster (`make dev`) starts it as soon as the engine is free.")
    if wait:
        _wait_for(asked.replays, context)
    if as_json:
        print_json(
            {
                "batch_id": batch_id,
                "replays": [replay.number for replay in asked.replays],
                "requests": asked.requests,
                "left_out": asked.left_out,
            }
        )
    elif wait:
        batch = context.store.batch(batch_id)
        say(f"{batch.completed:,} answered, {batch.failed:,} failed.")


@click.command()
@selecting(
    DeadLetterState.DEAD,
    DeadLetterState.REPLAYING,
    state_help="With `replaying`: take them back from a replay that is not running.",
)
@click.option("--reason", required=True, help="Reason, for the history of each request.")
def discard(batch_id: str, selection: Selection, reason: str) -> None:
    """Give up failed requests of BATCH: they stay in its error file and need no further action.

    Exit 1 if a replay is at work on some of them.
    """
    context = open_context()
    count = dead_letters.discard(
        batch_id,
        _in_states(selection, _DEAD),
        reason=reason,
        folder=context.folder,
        store=context.store,
        actor=person(),
        at=context.clock(),
    )
    say(f"{count:,} failed requests of {batch_id} are discarded.")


def _fields(pairs: Sequence[str]) -> dict[str, Any]:
    fields = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        try:
            fields[name] = foreign_json.decode(os.fsencode(text))
        except foreign_json.BadJson as error:
            raise click.BadParameter(f"--set {name}: {error.reason}") from error
        if not (name and separator):
            raise click.BadParameter(f"--set {pair}: expected FIELD=JSON")
    return fields


def _write_input(
    batch_id: str,
    selection: Selection,
    path: Path,
    context: Context,
    include_faulty: bool,
    *,
    as_json: bool,
) -> None:
    written = dead_letters.as_input(
        batch_id,
        selection,
        path,
        folder=context.folder,
        store=context.store,
        include_faulty=include_faulty,
    )
    if as_json:
        print_json({"file": str(path), "requests": written.written, "left_out": written.left_out})
        return
    _say_left_out(written.left_out)
    say(f"{written.written:,} requests are in {path}.")


def _say_left_out(left_out: Sequence[dead_letters.LeftOut]) -> None:
    for letter in left_out[:SHOWN_AT_FIRST]:
        say(f"left out: {letter}", err=True)
    if len(left_out) > SHOWN_AT_FIRST:
        say(f"left out: {len(left_out) - SHOWN_AT_FIRST:,} more", err=True)


def _wait_for(replays: Sequence[Replay], context: Context) -> None:
    mine = {(replay.batch_id, replay.number) for replay in replays}
    while mine.intersection(open_replays(context.folder)):
        context.sleep(LOOK_SECONDS)


def _table(letters: Iterable[DeadLetter]) -> Table:
    rows = map(_object, letters)
    return table(
        ("Line", "custom_id", "Code", "HTTP", "Attempts", "State", "Message"),
        (
            (
                *(row["line"], row["custom_id"], row["code"], row["status_code"]),
                *(row["attempts"], row["state"], shortened(row["message"])),
            )
            for row in rows
        ),
    )


def _object(letter: DeadLetter) -> dict[str, Any]:
    """Return a dead letter without its prompt, which stays in the store."""
    request, failure = letter.request, letter.request.outcome
    assert isinstance(failure, Failure)
    return {
        "custom_id": request.custom_id,
        "line": request.line,
        "index": request.index,
        "endpoint": request.endpoint or None,
        "code": failure.code,
        "message": failure.message,
        "status_code": failure.status,
        "attempts": request.attempts,
        "failed_attempts": request.failed_attempts,
        "state": letter.state,
        "first_failed_at": letter.first_failed_at,
        "last_failed_at": letter.last_failed_at,
        "replay": letter.replay,
        "resolved_at": letter.resolved_at,
        "discarded_at": letter.discarded_at,
        "discard_reason": letter.discard_reason,
    }
