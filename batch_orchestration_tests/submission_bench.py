"""A data folder in which files are split, their parts admitted, answered and delivered."""

import json
import time
from pathlib import Path
from typing import Any

from batch_orchestration.domain.batches import BatchPlan
from batch_orchestration.domain.lifecycle import FINAL
from batch_orchestration.domain.submissions import Submission
from batch_orchestration.engines.base import Engine
from batch_orchestration.services.assembly import AssemblyReport, assemble
from batch_orchestration.services.chunk_runner import run_chunks
from batch_orchestration.services.parts import admit_parts, register_lost, waiting_parts
from batch_orchestration.services.verdicts import Split
from batch_orchestration_tests.builders import NOW, make_line
from batch_orchestration_tests.inbox_bench import InboxBench
from batch_orchestration_tests.scripted_engine import ScriptedEngine
from batch_orchestration_tests.workbench import make_feeding


class SubmissionBench(InboxBench):
    """An inbox where ten requests are a chunk and twenty-five a batch, unless said otherwise."""

    def __init__(self, root: Path, **settings: Any) -> None:
        super().__init__(root, clock=time.time, **{"max_requests_per_batch": 25, **settings})

    def split(self, name: str, content: bytes, *, meta: bytes | None = None) -> Submission:
        """Admit a file that must be split; no part is admitted yet."""
        verdict = self.admit_file(name, content, meta=meta)
        assert isinstance(verdict, Split), verdict
        return self.folder.read_submission(verdict.submission)

    def admit_parts(self, *, max_unfinished: int = 1000) -> list[BatchPlan]:
        """Admit the parts for which there is room."""
        register_lost(self.folder, self.store, at=NOW)
        unfinished = sum(record.status not in FINAL for record in self.store.batches())
        waiting = waiting_parts(self.folder)[: max(0, max_unfinished - unfinished)]
        return admit_parts(
            [plan.batch_id for plan in waiting],
            folder=self.folder,
            store=self.store,
            obstacle_to=lambda plan: None,
            at=NOW,
        )

    def answer(self, plan: BatchPlan, engine: Engine | None = None) -> None:
        """Answer every request of a batch; it is not delivered yet."""
        done = run_chunks(
            {plan.batch_id: range(len(plan.chunks))},
            engine=engine or ScriptedEngine(),
            folder=self.folder,
            store=self.store,
            run_id=f"run-{plan.batch_id}",
            feeding=make_feeding(answer_settings=self.settings.answer_settings),
        )
        assert len(list(done)) == len(plan.chunks)

    def deliver(self, batch_id: str) -> AssemblyReport:
        """Write the files of a batch whose requests all have an outcome."""
        return assemble(batch_id, folder=self.folder, store=self.store, clock=lambda: NOW + 60)

    def finish(self, submission: Submission) -> list[AssemblyReport]:
        """Admit, answer and deliver every part, one after the other."""
        reports = []
        for part_id in submission.parts:
            self.admit_parts()
            self.answer(self.folder.read_plan(part_id))
            reports.append(self.deliver(part_id))
        return reports

    def delivered(self, batch_or_submission: str, name: str) -> list[dict[str, Any]]:
        """The lines of a file of the outbox."""
        path = self.folder.outbox_path(batch_or_submission) / name
        return [json.loads(line) for line in path.read_bytes().splitlines()]


def awkward_input(requests: int) -> bytes:
    """A file with a byte order mark, CRLF, blank lines at every tenth request, faults, repeats."""
    lines = [b"\xef\xbb\xbf"]
    for number in range(requests):
        line = make_line(number).rstrip(b"\n")
        if number % 17 == 3:
            line = b"not json"
        elif number % 17 == 5:
            line = make_line(number // 2).rstrip(b"\n")  # repeats one of long before
        lines.append(line + (b"\r\n" if number % 3 else b"\n"))
        if number % 10 in (9, 4):
            lines.append(b"\r\n \n")
    return b"".join(lines)
