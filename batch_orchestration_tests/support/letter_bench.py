"""A batch with failures, and what people do about them: what tests of dead letters stand at."""

import re
from pathlib import Path
from typing import Any

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.dead_letters import Selection
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.dead_letters.actions import RequestedReplay, discard, request_replay
from batch_orchestration.dead_letters.replaying import ReplayReport, run_replay
from batch_orchestration.delivery.assembly import Delivery, assemble
from batch_orchestration.engines.base import Engine
from batch_orchestration.files.journal import read_journal
from batch_orchestration.files.kept_input import ChunkRef, settled_requests
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.operations.recovery import Recovery, find_problem, recover
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import Workbench, make_policy

#: Tables and what identifies their rows; without the times that only the store knew.
TABLES = {
    "batches": "* EXCLUDE (in_progress_at, finalizing_at, completed_at)",
    "chunks": "* EXCLUDE (committed_at, run_id, memory_level)",
    "results": "*",
    "failed_requests": "*",
    "dead_letter_events": "*",
}


def number_of(body: bytes) -> int:
    """Which of the numbered questions a body asks."""
    return int(re.search(rb"question (\d+)", body)[1])


def refusing(*numbers: int) -> ScriptedEngine:
    """An engine that refuses these requests and answers the others."""

    def script(body: bytes, submitted: int):
        if number_of(body) in numbers:
            return Failure(code=FailureCode.ENGINE_REFUSED, message="scripted", status=400)
        return None

    return ScriptedEngine(script)


class LetterBench(Workbench):
    """A workbench with one batch, some requests of which have failed."""

    def __init__(
        self, root: Path, *, failing: tuple[int, ...] = (3, 4, 17), requests: int = 25
    ) -> None:
        super().__init__(root)
        self.plan: BatchPlan = self.admitted(requests)
        self.batch_id = self.plan.batch_id
        self.run(self.plan, refusing(*failing))

    def ask(self, selection: Selection | None = None, **fields: Any) -> RequestedReplay:
        """Ask for a replay."""
        return request_replay(
            self.batch_id,
            selection or Selection(),
            folder=self.folder,
            store=self.store,
            **{"actor": "tester", "at": NOW + 10, **fields},
        )

    def replay(
        self,
        number: int,
        engine: Engine | None = None,
        *,
        run_id: str = "replay-run",
        **policy: Any,
    ) -> ReplayReport:
        """Run a replay."""
        return run_replay(
            self.batch_id,
            number,
            RunContext(
                engine=engine or ScriptedEngine(),
                folder=self.folder,
                store=self.store,
                run_id=run_id,
                policy=make_policy(**policy),
            ),
            clock=lambda: NOW + 20,
        )

    def discard(self, selection: Selection | None = None, reason: str = "not worth it") -> int:
        """Give dead letters up."""
        return discard(
            self.batch_id,
            selection or Selection(),
            reason=reason,
            folder=self.folder,
            store=self.store,
            actor="tester",
            at=NOW + 15,
        )

    def recover(self) -> Recovery:
        """Make the store anew."""
        problem = find_problem(folder=self.folder, store=self.store) or "a test wants it"
        return recover(folder=self.folder, problem=problem, clock=lambda: NOW + 30)

    def assemble(self) -> Delivery:
        """Write the output."""
        return assemble(self.batch_id, folder=self.folder, store=self.store, clock=lambda: NOW + 25)

    def recommit(self, number: int) -> None:
        """Commit a chunk once more from its journal."""
        ref = ChunkRef.of(self.plan, number, self.folder)
        entries = {entry.index: entry for entry in read_journal(ref.journal_path)}
        self.store.commit_chunk(
            self.batch_id,
            number,
            settled_requests(ref, entries),
            run_id="again",
            at=NOW + 50,
            seconds=1.0,
        )

    def states(self) -> dict[int, str]:
        """State of every dead letter there ever was."""
        letters = self.store.dead_letters(self.batch_id, Selection(states=()))
        return {letter.request.index: str(letter.state) for letter in letters}

    def events(self, index: int, columns: str) -> list[tuple[Any, ...]]:
        """Columns of a dead letter's history, oldest event first."""
        return self.store.query(
            f"SELECT {columns} FROM dead_letter_events WHERE request_index = {index}"
            " ORDER BY happened_at, operation NULLS FIRST"
        )[1]

    def history(self, index: int) -> list[str]:
        """States that a dead letter was in, in order."""
        return [state for (state,) in self.events(index, "state")]

    def lines(self, name: str) -> list[bytes]:
        """Lines of a file in the outbox."""
        path = self.folder.outbox_path(self.batch_id) / name
        return path.read_bytes().splitlines() if path.exists() else []

    def contents(self) -> dict[str, list[tuple]]:
        """All rows of all tables, comparable with those of a store that was made anew."""
        return {
            table: sorted(self.store.query(f"SELECT {columns} FROM {table}")[1], key=repr)
            for table, columns in TABLES.items()
        }

    def assert_accounts_add_up(self) -> None:
        """Every request is in exactly one of completed and failed, in tables and figures."""
        record = self.store.batch(self.batch_id)
        assert self.indices(self.plan) == list(range(self.plan.requests))
        assert record.completed + record.failed == self.plan.requests
        unresolved = [state for state in self.states().values() if state != "resolved"]
        assert record.failed == len(unresolved) == len(self.store.failures(self.batch_id))
        reports = self.store.chunk_reports(self.batch_id).values()
        assert sum(report.completed for report in reports) == record.completed
        assert sum(report.failed for report in reports) == record.failed
        by_code = self.store.failure_counts(self.batch_id)
        assert sum(by_code.values()) == record.failed
