"""The command line on one data folder, and a stand-in for what Dagster does between commands."""

import json
import time

from click.testing import CliRunner
from rich.console import Console

from batch_orchestration.admission.admission import admit
from batch_orchestration.admission.inbox import Inbox
from batch_orchestration.cli import main
from batch_orchestration.cli.context import Context
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.settings import load_settings
from batch_orchestration.store.store import Store
from batch_orchestration.workers.progress import Progress, write_progress
from batch_orchestration_tests.support.builders import NOW, make_input, make_settled_chunk


class CommandLine:
    """Runs commands on one data folder, and does what Dagster would do in between."""

    def __init__(self, folder):
        self.folder = folder
        self.store = Store(folder.duckdb, deadline_seconds=5)

    def run(self, *arguments, exit_code=0, **context):
        """Run a command; fields of its context can be replaced."""
        given = self.context(**context) if context else None
        result = CliRunner().invoke(main, [str(word) for word in arguments], obj=given)
        assert result.exit_code == exit_code, result.output
        return result

    def json(self, *arguments, exit_code=0, **context):
        """Run a command with `--json`; return what it printed."""
        result = self.run(*arguments, "--json", exit_code=exit_code, **context)
        return json.loads(result.stdout)

    def context(self, **fields):
        """The context that commands have here."""
        console = Console(width=200)
        values = {"settings": load_settings(), "folder": self.folder, "store": self.store}
        return Context(**{**values, "console": console, **fields})

    def admit_inbox(self):
        """Claim and admit what lies in the inbox; return the verdicts."""
        settings = load_settings()
        inbox = Inbox(self.folder, settings)
        return [
            admit(claim, folder=self.folder, store=self.store, settings=settings)
            for claim in inbox.claim_ready(now=time.time() + 60)
        ]

    def admit_batch(self, tmp_path, *, requests=3):
        """Submit and admit a file; return the plan."""
        (tmp_path / "people.jsonl").write_bytes(make_input(requests))
        self.run("submit", tmp_path / "people.jsonl")
        (verdict,) = self.admit_inbox()
        return self.folder.read_plan(verdict.batch_id)

    def impatient_store(self):
        """A store that does not wait for others."""
        return Store(self.folder.duckdb, deadline_seconds=0.2)

    def settle(self, plan, *, failing=()):
        """Commit every chunk."""
        for chunk in plan.chunks:
            self.store.commit_chunk(
                plan.batch_id,
                chunk.number,
                make_settled_chunk(chunk, failing=failing),
                run_id="r",
                at=NOW,
                seconds=2.0,
            )

    def assemble(self, plan):
        """Write the output."""
        assemble(plan.batch_id, folder=self.folder, store=self.store, clock=lambda: NOW + 60)

    def progress(self, plan, **fields):
        """Write what a run tells of itself."""
        values = {
            "batch_id": plan.batch_id,
            "run_id": "run-1",
            "pid": 4242,
            "updated_at": time.time(),
            "phase": "feeding",
            "total": plan.requests,
            "completed": 1,
            "failed": 1,
            "in_flight": 1,
            "prompt_tokens": 10,
            "completion_tokens": 20,
            "requests_per_second": 0.5,
            "output_tokens_per_second": 140.0,
            "eta_seconds": 63.0,
        }
        path = self.folder.progress_path(plan.batch_id)
        write_progress(path, Progress(**{**values, **fields}))
