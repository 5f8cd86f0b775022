"""`submit` and `validate`: the commands for authors of batch files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import msgspec

from batch_orchestration.admission import submit as submission
from batch_orchestration.admission import validation
from batch_orchestration.admission.reading.batch_files import open_batch_file
from batch_orchestration.admission.sidecars import named_problem, own_sidecar, read_options
from batch_orchestration.cli.context import Context, json_option, open_context, print_json
from batch_orchestration.cli.escaping import say
from batch_orchestration.cli.tables import table
from batch_orchestration.cli.watching import finish, follow_shown
from batch_orchestration.core.batches import BatchOptions, batch_id, identity
from batch_orchestration.core.errors import FileRefused
from batch_orchestration.estimates.estimate import estimate_rows
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration.status.overview import rejections
from batch_orchestration.status.views import find_identity

#: A running sensor claims a settled file within a few ticks of five seconds, not counting a tick
#: already started.
PATIENCE_SECONDS = 30.0
LOOK_SECONDS = 1.0
_BLOCK_BYTES = 2**20

_file_argument = click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, path_type=Path)
)


@click.command()
@_file_argument
@click.option("--model", help="Served model that answers every request.")
@click.option("--priority", type=int, help="Higher runs earlier; default 0.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="Echoed back; repeatable.")
@click.option("--completion-window", metavar="DURATION", help="Like 90s or 1h30m; default 24h.")
@click.option("--user", help="Who submits it; the engine is shared fairly between users.")
@click.option(
    "--max-failure-rate",
    type=click.FloatRange(0, 1),
    help="Share of failures at which the batch pauses; 1 never. Default: BATCH_MAX_FAILURE_RATE.",
)
@click.option("--wait", is_flag=True, help="Watch the batch until it ends.")
@json_option
def submit(
    file: Path,
    model: str | None,
    priority: int | None,
    metadata: tuple[str, ...],
    completion_window: str | None,
    user: str | None,
    max_failure_rate: float | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Put a copy of FILE into the inbox.

    Options given here override a side-car (NAME.meta.json) beside FILE.
    """
    context = open_context()
    given = {
        "model": model,
        "priority": priority,
        "metadata": _pairs(metadata),
        "completion_window": completion_window,
        "user": user,
        "max_failure_rate": max_failure_rate,
    }
    options = _options(file, {name: value for name, value in given.items() if value is not None})
    sent = send(file, options, context)
    if not as_json and sent.inbox_path is not None:
        _say_estimate(
            validation.validate(
                file,
                settings=context.settings,
                options=options,
                tables=EstimateTables(context.store),
                max_listed_faults=0,
            )
        )
    _say_sent(sent, as_json=as_json, lines=wait)
    if wait:
        admitted_as = sent.wait_until_admitted()
        finish(follow_shown(admitted_as, context, as_json=as_json), as_json=as_json)


@click.command()
@_file_argument
@json_option
def validate(file: Path, as_json: bool) -> None:
    """Check FILE as admission would, without admitting it; exit 1 if a line is faulty."""
    context = open_context()
    report = validation.validate(
        file, settings=context.settings, tables=EstimateTables(context.store)
    )
    if as_json:
        print_json(report)
    else:
        _show(report, context)
    if report.refusal is not None:
        raise click.ClickException(f"{file}: would be rejected: {report.refusal}")
    if report.faulty:
        faulty = f"{report.faulty:,} of {report.requests:,} requests"
        raise click.ClickException(f"{file}: {faulty} would fail unasked; the rest would run")


def _show(report: validation.ValidationReport, context: Context) -> None:
    if report.faults:
        rows = ((fault.line, fault.custom_id, fault.code, fault.message) for fault in report.faults)
        context.console.print(table(("Line", "custom_id", "Code", "Problem"), rows))
    if report.faults_not_listed:
        say(f"… and {report.faults_not_listed:,} more")
    if report.refusal is None:
        say(
            f"{report.file_name}: {report.requests:,} requests, {report.faulty:,} of them faulty;"
            f" chunks: {report.chunks:,}"
        )
    _say_estimate(report)


def send(file: Path, options: BatchOptions, context: Context) -> "Submission":
    """Put a copy of a file into the inbox, unless the same batch was admitted before."""
    key = content_identity(file, options)
    rejected_before = frozenset(r.rejected_path for r in rejections(context.folder))
    inbox_path, known = None, find_identity(key, folder=context.folder)
    if known is None:
        inbox_path = submission.submit(file, options, context.folder)
        known = batch_id(inbox_path.name, key)
    return Submission(context, key, known, inbox_path, rejected_before)


@dataclass(frozen=True)
class Submission:
    """A submitted file on its way through the inbox.

    Attributes:
        batch_id: Of the batch that the file becomes, or already is.
        inbox_path: Path of the copy; None if the same batch was admitted before.
    """

    context: Context
    identity: str
    batch_id: str
    inbox_path: Path | None
    rejected_before: frozenset[str]

    def wait_until_admitted(self) -> str:
        """Wait until the file is admitted, and return the batch's id.

        Raises:
            FileRefused: The file was rejected; the message has the reason and the next step.
        """
        started, reminded = self.context.clock(), False
        while (found := find_identity(self.identity, folder=self.context.folder)) is None:
            self._raise_if_rejected()
            untouched = self.inbox_path is not None and self.inbox_path.exists()
            overdue = self.context.clock() - started > PATIENCE_SECONDS
            if untouched and overdue and not reminded:
                say("The file has not been claimed. Is Dagster running? `make dev`", err=True)
                reminded = True
            self.context.sleep(LOOK_SECONDS)
        return found

    def _raise_if_rejected(self) -> None:
        for rejected in rejections(self.context.folder):
            if rejected.rejected_path in self.rejected_before or self.inbox_path is None:
                continue
            if rejected.file_name == self.inbox_path.name:
                raise FileRefused(str(rejected))


def _say_estimate(report: validation.ValidationReport) -> None:
    if report.estimate is not None:
        for name, text in estimate_rows(report.estimate):
            say(f"{name}: {text}")


def _say_sent(sent: Submission, *, as_json: bool, lines: bool) -> None:
    if as_json:
        print_json(
            {
                "batch_id": sent.batch_id,
                "inbox_file": sent.inbox_path,
                "already_admitted": sent.inbox_path is None,
            },
            lines=lines,
        )
    elif sent.inbox_path is None:
        say(f"The same content and options are a batch already: {sent.batch_id}")
    else:
        say(
            f"Submitted as {sent.inbox_path}\n"
            f"It becomes batch {sent.batch_id}: python -m batch_orchestration status"
        )


def _options(file: Path, given: dict[str, Any]) -> BatchOptions:
    written = msgspec.to_builtins(read_options(own_sidecar(file)))
    try:
        return msgspec.convert(written | given, BatchOptions)
    except msgspec.ValidationError as error:
        raise click.UsageError(named_problem(error)) from error


def _pairs(metadata: tuple[str, ...]) -> dict[str, str] | None:
    pairs = dict(pair.partition("=")[::2] for pair in metadata)
    if any("=" not in pair for pair in metadata) or "" in pairs:
        raise click.UsageError("--metadata takes KEY=VALUE")
    return pairs or None


def content_identity(file: Path, options: BatchOptions) -> str:
    """Return the identity of the batch made from this file and these options."""
    digest = hashlib.sha256()
    with open_batch_file(file) as content:
        while block := content.read(_BLOCK_BYTES):
            digest.update(block)
    return identity(digest.hexdigest(), options)
