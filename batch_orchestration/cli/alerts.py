"""`alerts`: which are open, what is still to be sent, and a test of every channel."""

import click
from rich.table import Table
from rich.text import Text

from batch_orchestration.cli.context import (
    Context,
    json_option,
    open_context,
    print_json,
)
from batch_orchestration.cli.visible import say
from batch_orchestration.domain.alert_book import AlertBook
from batch_orchestration.domain.errors import BatchOrchestrationError
from batch_orchestration.services.alert_channels import alert_channels
from batch_orchestration.services.alert_watchdog import LOOK_SECONDS, Watchdog
from batch_orchestration.services.alerting import send_test
from batch_orchestration.services.wording import duration
from batch_orchestration.storage.alert_files import read_book

_SET_ONE = (
    "No channel is set: alerts are only in the log. Set BATCH_ALERT_WEBHOOK_URL,"
    " BATCH_ALERT_EMAIL_TO with BATCH_SMTP_HOST, or BATCH_ALERT_COMMAND."
)


@click.command()
@click.option("--test", is_flag=True, help="Send a test alert through every channel.")
@click.option("--watch", is_flag=True, help="Until Ctrl-C: tell if Dagster looks for none.")
@json_option
def alerts(test: bool, watch: bool, as_json: bool) -> None:
    """Show the open alerts and what is still to be sent.

    With --test: send one through every channel and say what happened; exit 1 unless all took it.
    With --watch: tell through every channel if Dagster's daemon is dead, which cannot do so itself.
    """
    context = open_context()
    if watch and (test or as_json):
        raise click.UsageError("--watch goes with no other option")
    if watch:
        _watch(context)
        return
    if test:
        _send_test(context, as_json=as_json)
        return
    book = read_book(context.folder.alerts)
    if as_json:
        print_json(_object(book))
    elif book is None:
        say("alert_sensor has not looked yet.")
    else:
        _show(context, book)


def _send_test(context: Context, *, as_json: bool) -> None:
    channels = alert_channels(context.settings)
    problems = send_test(channels, folder=context.folder, now=context.clock())
    if as_json:
        print_json(problems)
    for name, problem in problems.items() if not as_json else ():
        say(f"{name}: {problem or 'sent'}")
    if not channels:
        say(_SET_ONE, err=True)
    if not channels or any(problems.values()):
        click.get_current_context().exit(1)


def _watch(context: Context) -> None:
    channels = alert_channels(context.settings)
    if not channels:
        say(_SET_ONE, err=True)
    watchdog = Watchdog(context.settings, context.folder, channels, clock=context.monotonic)
    while True:
        try:
            tended = watchdog.look(context.clock())
            for message in tended.news:
                say(message.text)
            for name, problem in tended.problems.items():
                say(f"{name}: {problem or 'sent'}")
        except (BatchOrchestrationError, OSError) as error:  # it is no reason to stop watching
            say(f"cannot look: {error}", err=True)
        try:
            context.sleep(LOOK_SECONDS)
        except KeyboardInterrupt:
            return


def _show(context: Context, book: AlertBook) -> None:
    now = context.clock()
    table = Table("Since", "Is", "What", "Cause", "Next")
    for opened in sorted(book.opened.values(), key=lambda opened: opened.since):
        alert = opened.alert
        table.add_row(
            Text(f"{duration(max(0.0, now - opened.since))} ago"),
            Text("is going" if opened.gone_at is not None else alert.severity),
            Text(alert.title),
            Text(alert.cause),
            Text(alert.next_command or alert.link or ""),
        )
    if book.opened:
        context.console.print(table)
    else:
        say("No alert is open.")
    for name, channel in book.channels.items():
        state = f"{channel.waiting} to be sent"
        if channel.problem is not None:
            wait = max(0.0, channel.next_at - now)
            state += f"; {channel.problem}; tried again in {duration(wait)}"
        say(f"{name}: {state}")
    if not book.channels:
        say(_SET_ONE)


def _object(book: AlertBook | None) -> dict[str, object]:
    if book is None:
        return {"open": [], "channels": {}}
    return {
        "open": [
            {"since": opened.since, "gone_at": opened.gone_at, "alert": opened.alert}
            for opened in book.opened.values()
        ],
        "channels": {
            name: {
                "waiting": channel.waiting,
                "problem": channel.problem,
                "next_at": channel.next_at,
            }
            for name, channel in book.channels.items()
        },
    }
