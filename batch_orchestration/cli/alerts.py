"""`alerts`: the open alerts, the unsent notifications, and a test of every channel."""

import click

from batch_orchestration.cli.context import Context, json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.tables import table
from batch_orchestration.core.errors import BatchOrchestrationError
from batch_orchestration.core.text import duration
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.alerts.channels import alert_channels
from batch_orchestration.operations.alerts.cycle import WATCH_SECONDS, Watchdog, send_test
from batch_orchestration.operations.alerts.state import AlertState
from batch_orchestration.operations.health.report import Finding

_SET_ONE = (
    "No channel is set: alerts are only in the log. Set BATCH_ALERT_WEBHOOK_URL,"
    " BATCH_ALERT_EMAIL_TO with BATCH_SMTP_HOST, or BATCH_ALERT_COMMAND."
)


@click.command()
@click.option("--test", is_flag=True, help="Send a test alert through every channel.")
@click.option("--watch", is_flag=True, help="Until Ctrl-C: send an alert if Dagster is dead.")
@json_option
def alerts(test: bool, watch: bool, as_json: bool) -> None:
    """Show the open alerts and the notifications that are still to be sent.

    With --test: send a test alert through every channel and print the results; exit 1 unless all
    accept it. With --watch: send an alert through every channel if Dagster's daemon is dead, which
    cannot do so itself.
    """
    context = open_context()
    if watch and (test or as_json):
        raise click.UsageError("--watch excludes other options")
    if watch:
        _watch(context)
        return
    if test:
        _send_test(context, as_json=as_json)
        return
    state = StateFile(context.folder.alerts, AlertState).read()
    if as_json:
        print_json(_object(state))
    elif state is None:
        say("alert_sensor has not run yet.")
    else:
        _show(context, state)


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
            for text in watchdog.check(context.clock()).lines():
                say(text)
        except (BatchOrchestrationError, OSError) as error:  # a failed check does not end the watch
            say(f"the check failed: {error}", err=True)
        try:
            context.sleep(WATCH_SECONDS)
        except KeyboardInterrupt:
            return


def _show(context: Context, state: AlertState) -> None:
    now = context.clock()
    rows = [
        (
            f"{duration(max(0.0, now - (finding.since or now)))} ago",
            "recovering" if finding.check in state.gone else finding.level.severity,
            finding.title,
            finding.reason,
            finding.next_command or finding.link,
        )
        for finding in _open(state)
    ]
    if rows:
        context.console.print(table(("Since", "Severity", "Alert", "Reason", "Next"), rows))
    else:
        say("No alert is open.")
    for name, channel in state.channels.items():
        line = f"{channel.pending.count} to be sent"
        if channel.problem is not None:
            wait = max(0.0, channel.next_at - now)
            line += f"; {channel.problem}; next attempt in {duration(wait)}"
        say(f"{name}: {line}")
    if not state.channels:
        say(_SET_ONE)


def _open(state: AlertState) -> list[Finding]:
    """Return the open alerts, oldest first."""
    return sorted((last.finding for last in state.open.values()), key=lambda f: f.since or 0.0)


def _object(state: AlertState | None) -> dict[str, object]:
    if state is None:
        return {"open": [], "channels": {}}
    alerts = [{**f.to_json(), "gone_at": state.gone.get(f.check)} for f in _open(state)]
    channels = {
        name: {
            "waiting": channel.pending.count,
            "problem": channel.problem,
            "next_at": channel.next_at,
        }
        for name, channel in state.channels.items()
    }
    return {"open": alerts, "channels": channels}
