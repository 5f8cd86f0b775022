"""`results`: the finished requests of a batch, as lines or as a table."""

import shutil
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

import click

from batch_orchestration.cli.context import Context, json_option, open_context, print_json
from batch_orchestration.cli.escaping import escaped, say
from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.delivery.exports import TableFormat, flat_outcome, write_table
from batch_orchestration.delivery.lines import output_line
from batch_orchestration.delivery.snapshot import Snapshot, read_snapshot, take_snapshot
from batch_orchestration.files.atomic import atomic_writer

_EARLY = frozenset({BatchStatus.CANCELLED, BatchStatus.EXPIRED})


class Format(StrEnum):
    """The formats of results."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


@click.command()
@click.argument("batch_id", metavar="BATCH")
@click.option("--partial", is_flag=True, help="The outcomes so far of an unfinished batch.")
@click.option(
    "--format",
    "format_",
    type=click.Choice([str(kind) for kind in Format]),
    default=str(Format.JSONL),
    show_default=True,
    help="jsonl: lines as in output.jsonl and errors.jsonl; else one flat row per request.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write to FILE, which appears whole, instead of the terminal.",
)
@click.option(
    "--raw-cells",
    is_flag=True,
    help="csv: put no ' before text that a spreadsheet would run as a formula.",
)
@json_option
def results(
    batch_id: str,
    partial: bool,
    format_: str,
    output: Path | None,
    raw_cells: bool,
    as_json: bool,
) -> None:
    """Print the outcome of each request of BATCH in input order, failures included.

    Works while the batch runs, without disturbing it. Partial results are reported as such on
    stderr, and with --output and --json in the printed summary.
    """
    kind = Format(format_)
    if as_json and output is None:
        raise click.UsageError("--json prints a summary and needs --output FILE")
    if kind is Format.PARQUET and output is None and sys.stdout.isatty():
        raise click.UsageError("a terminal cannot show parquet: add --output FILE")
    context = open_context()
    snapshot = take_snapshot(batch_id, folder=context.folder, store=context.store)
    if snapshot.partial and not partial:
        raise click.ClickException(
            f"{batch_id} is {snapshot.status}: {_so_far(snapshot)} requests have an outcome;"
            " --partial prints them"
        )
    if snapshot.partial:
        say(f"partial: {_so_far(snapshot)} requests of {batch_id}", err=True)
    elif snapshot.status in _EARLY:
        say(
            f"{batch_id} is {snapshot.status}: requests without an answer have the code"
            f" batch_{snapshot.status}",
            err=True,
        )
    _write(snapshot, kind, output, context, raw=raw_cells)
    if as_json:
        print_json({**_summary(snapshot), "format": str(kind), "output": str(output)})


def _so_far(snapshot: Snapshot) -> str:
    share = 100 * snapshot.done / snapshot.total if snapshot.total else 100.0
    return f"{snapshot.done:,} of {snapshot.total:,} ({share:.1f} %)"


def _summary(snapshot: Snapshot) -> dict[str, str | int | bool]:
    return {
        "batch_id": snapshot.plan.batch_id,
        "status": str(snapshot.status),
        "partial": snapshot.partial,
        "done": snapshot.done,
        "total": snapshot.total,
    }


def _write(
    snapshot: Snapshot, kind: Format, output: Path | None, context: Context, *, raw: bool
) -> None:
    if kind is not Format.JSONL:
        _write_table(snapshot, kind, output, context, raw=raw)
    elif output is None:
        _write_lines(snapshot, sys.stdout.buffer, context)
    else:
        with atomic_writer(output) as file:
            _write_lines(snapshot, file, context)


def _write_lines(snapshot: Snapshot, file: BinaryIO, context: Context) -> None:
    for request in read_snapshot(snapshot, folder=context.folder, store=context.store):
        line = output_line(snapshot.plan.batch_id, request)
        # A file gets the bytes as they are; a terminal could take them for commands.
        file.write(escaped(line.decode(errors="replace")).encode() if file.isatty() else line)
    file.flush()


def _write_table(
    snapshot: Snapshot, kind: Format, output: Path | None, context: Context, *, raw: bool
) -> None:
    metadata = {name: str(value) for name, value in _summary(snapshot).items()}
    metadata["partial"] = metadata["partial"].lower()
    with tempfile.TemporaryDirectory(prefix="batch-results-") as folder:
        path = output or Path(folder) / "table"
        requests = read_snapshot(snapshot, folder=context.folder, store=context.store)
        rows = map(flat_outcome, requests)
        write_table(rows, path, TableFormat(str(kind)), metadata=metadata, raw=raw)
        if output is None:
            _print_table(path)


def _print_table(path: Path) -> None:
    with path.open("rb") as file:
        if sys.stdout.isatty():
            for line in file:
                say(line.decode(), nl=False)
            return
        shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()
