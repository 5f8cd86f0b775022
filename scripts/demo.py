"""The demo: examples/candidates.jsonl from the inbox to the outbox on a real engine.

Starts Dagster, drops the file, shows the progress, prints the result and stops everything again.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import click
from dagster_dev import POLL_SECONDS, DagsterDev, DagsterFailed
from demo_settings import REPOSITORY, SettingsMissing, fill_in
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table
from rich.text import Text

from batch_orchestration.cli.context import Context, open_context
from batch_orchestration.cli.submitting import Submission, content_identity, send
from batch_orchestration.cli.watching import follow_shown
from batch_orchestration.core.batches import BatchOptions, BatchStatus
from batch_orchestration.core.errors import BatchOrchestrationError
from batch_orchestration.core.results import SIMULATED
from batch_orchestration.core.text import duration
from batch_orchestration.hosting.hosts import end_engines
from batch_orchestration.status.views import BatchStatusView, find_identity, view_batch

EXAMPLE = REPOSITORY / "examples" / "candidates.jsonl"
ANSWERS_SHOWN = 3
#: As many failed runs in a row as dispatch itself puts up with.
FAILED_RUNS_ENDURED = 3
RUN_CHECK_SECONDS = 5.0
_FAILED_RUNS = """query($after: Float) {
  runsOrError(filter: {statuses: [FAILURE], createdAfter: $after}, limit: 20) {
    ... on Runs { results { runId jobName } } } }"""
_STEP_FAILURES = """query($run: ID!) { logsForRun(runId: $run) {
  ... on EventConnection { events { ... on ExecutionStepFailureEvent {
    error { message errorChain { error { message } } } } } } } }"""


class DemoFailed(click.ClickException):
    """The demo did not come to its end."""


class Demo:
    """One walk through the demo, with Dagster running beside it."""

    def __init__(self, dagster: DagsterDev | None, console: Console) -> None:
        self._dagster = dagster
        self._console = console
        self._started = time.time()
        self._checked_at = time.monotonic()
        self._failed_runs: set[str] = set()

    def wait_for_dagster(self) -> None:
        """Wait for the web server, telling for what and how long."""
        if self._dagster is None:
            self._console.print("Dagster runs here already; it is used and left running.")
            return
        what = "Starting Dagster: web server, daemon, code (about half a minute)"
        with self._console.status(what) as status:
            if not self._console.is_terminal:
                self._console.print(what)
            self._dagster.wait_until_ready(
                tell=lambda seconds: status.update(f"{what}: {seconds:.0f} s")
            )
        self._console.print(f"Dagster's UI: {self._dagster.url}", highlight=False)

    def run(self, sent: Submission, context: Context) -> BatchStatusView:
        """Follow the file from the inbox to the end of its batch."""
        if sent.inbox_path is not None:
            self._console.print(f"Dropped {EXAMPLE.name} into {sent.inbox_path.parent}")
            what = "The inbox sensor takes it, and a run admits it (about half a minute)"
            with self._console.status(what):
                if not self._console.is_terminal:
                    self._console.print(what)
                batch_id = sent.wait_until_admitted()
        else:
            batch_id = sent.batch_id
            self._console.print(f"{batch_id} was begun earlier; it goes on where it stopped.")
        self._console.print("Next, a run loads the model, which takes a minute on a CPU.")
        return follow_shown(batch_id, context)

    def sleep(self, seconds: float) -> None:
        """Wait, and notice if there is nothing left to wait for."""
        time.sleep(seconds)
        if self._dagster is None:
            return
        self._dagster.check()
        self._dagster.mend()
        if time.monotonic() - self._checked_at >= RUN_CHECK_SECONDS:
            self._checked_at = time.monotonic()
            # A web server too busy to answer is asked again later.
            with contextlib.suppress(OSError):
                self._tell_failed_runs(self._dagster)

    def _tell_failed_runs(self, dagster: DagsterDev) -> None:
        answer = dagster.graphql(_FAILED_RUNS, after=self._started)
        for run in answer["runsOrError"]["results"]:
            if run["runId"] not in self._failed_runs:
                self._failed_runs.add(run["runId"])
                page = f"{dagster.url}/runs/{run['runId']}"
                reason = _failure_of(dagster, run["runId"])
                self._console.print(Text(f"A run of {run['jobName']} failed: {reason}\n{page}"))
        if len(self._failed_runs) >= FAILED_RUNS_ENDURED:
            raise DemoFailed(
                f"{len(self._failed_runs)} runs failed; logs are in data/logs/runs and "
                "data/logs/engines. Nothing is lost: `make demo` goes on from here."
            )


def _failure_of(dagster: DagsterDev, run_id: str) -> str:
    """Return what a run's step died of: the innermost message."""
    events = dagster.graphql(_STEP_FAILURES, run=run_id)["logsForRun"].get("events", [])
    errors = [event["error"] for event in events if event.get("error")]
    if not errors:
        return "its worker ended"
    innermost = errors[-1]["errorChain"][-1:] or [{"error": errors[-1]}]
    return str(innermost[0]["error"]["message"]).strip()


def show_result(view: BatchStatusView, context: Context) -> None:
    """Print counts, files, and the first answers."""
    console = context.console
    counts = Table(box=None, show_header=False, pad_edge=False)
    by_code = context.store.failure_counts(view.batch_id)
    seconds = view.times.get("completed", 0) - view.times.get("in_progress", 0)
    if view.engine == SIMULATED:
        console.print("The engine was simulated: these answers are made up.", style="bold")
    for name, value in (
        ("Requests", f"{view.total:,}"),
        ("Answered", f"{view.completed:,}"),
        ("Failed", f"{view.failed:,}  " + ", ".join(f"{c} {n}" for c, n in by_code.items())),
        ("Tokens", "{:,} prompt, {:,} completion".format(*view.tokens)),
        ("Duration", f"{duration(seconds)}, from admission to these files"),
        ("Output file", str(view.output_file)),
        ("Error file", str(view.error_file)),
        ("Report", str(context.folder.outbox_path(view.batch_id) / "report.md")),
    ):
        counts.add_row(name, Text(value))
    console.print(counts)
    for custom_id, answer in first_answers(view.output_file):
        console.print()
        console.print(Text(custom_id, style="bold"))
        console.print(Text(answer))


def first_answers(output_file: Path | None) -> Iterator[tuple[str, str]]:
    """Yield custom_id and text of the first answers of a chat batch."""
    if output_file is None:
        return
    with output_file.open(encoding="utf-8") as lines:
        for line in islice(lines, ANSWERS_SHOWN):
            answer = json.loads(line)
            message = answer["response"]["body"]["choices"][0]["message"]
            yield answer["custom_id"], str(message["content"]).strip()


@click.command(help=__doc__)
@click.option("--keep", is_flag=True, help="Leave Dagster's UI running until Ctrl-C.")
@click.option("--again", is_flag=True, help="Run it as a new batch, though it was done before.")
@click.option("--serve", is_flag=True, help="Only run Dagster, with the demo's settings.")
def main(keep: bool, again: bool, serve: bool) -> None:
    """Run the demo."""
    os.chdir(REPOSITORY)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        os.environ.update(fill_in(os.environ))
        context = open_context()
        context.folder.create()
        if serve:
            _serve(context)
        else:
            _demonstrate(context, keep=keep, again=again)
    except (SettingsMissing, DagsterFailed, BatchOrchestrationError) as error:
        raise DemoFailed(str(error)) from error


def _demonstrate(context: Context, *, keep: bool, again: bool) -> None:
    options = BatchOptions(metadata={"run": f"{time.time():.0f}"} if again else {})
    known = find_identity(content_identity(EXAMPLE, options), folder=context.folder)
    done = _view(known, context) if known else None
    if done and done.final:
        context.console.print(f"This batch was done earlier, as {done.batch_id}. Its result:\n")
        show_result(done, context)
        context.console.print("\nTo run it again: make demo DEMO_ARGS=--again")
        if not keep:
            return
    with _dagster(context) as dagster:
        demo = Demo(dagster, context.console)
        demo.wait_for_dagster()
        if not (done and done.final):
            context = replace(context, sleep=demo.sleep)
            view = demo.run(send(EXAMPLE, options, context), context)
            if view.status is not BatchStatus.COMPLETED:
                raise DemoFailed(f"batch {view.batch_id} ended as {view.status}")
            show_result(view, context)
        if keep and dagster is not None:
            _stay(dagster, context)
        elif dagster is not None:
            context.console.print("\nStopping Dagster. `make dev` keeps it and its UI running.")


def _serve(context: Context) -> None:
    with _dagster(context) as dagster:
        if dagster is None:
            raise DemoFailed("Dagster runs in this folder already")
        Demo(dagster, context.console).wait_for_dagster()
        _stay(dagster, context)


def _stay(dagster: DagsterDev, context: Context) -> None:
    context.console.print(
        f"\nDagster goes on at {dagster.url}; files dropped into {context.folder.inbox} are "
        "answered. Ctrl-C stops it.",
        highlight=False,
    )
    try:
        while True:
            dagster.check()
            dagster.mend()
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        context.console.print("Stopping Dagster")


@contextlib.contextmanager
def _dagster(context: Context) -> Iterator[DagsterDev | None]:
    """Run Dagster until the end of the block; None if it runs in this folder already."""
    # Two daemons on one instance fight over every tick.
    lock = FileLock(context.folder.root / ".dagster-dev.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield None
        return
    with (
        lock,
        DagsterDev(
            REPOSITORY, log_path=context.folder.logs / "dagster-dev.log", environ=_environ()
        ) as dagster,
    ):
        try:
            yield dagster
        finally:
            # It would stay warm, but nothing uses it once Dagster has stopped.
            end_engines(context.folder, only_idle=False)


def _environ() -> dict[str, str]:
    # Another instance's home would hide ./dagster.yaml.
    kept = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
    programs = str(Path(sys.executable).parent)
    return {**kept, "PATH": os.pathsep.join([programs, kept.get("PATH", "")])}


def _view(batch_id: str, context: Context) -> BatchStatusView:
    return view_batch(batch_id, folder=context.folder, store=context.store, now=context.clock())


if __name__ == "__main__":
    main()
