"""A data folder in which long files are answered window by window, as dispatch asks for it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.delivery.assembly import AssemblyReport, assemble
from batch_orchestration.dispatch.run_planning import NeededRun, dispatch
from batch_orchestration.engines.base import Engine
from batch_orchestration.inference.run import CommittedChunk, run_chunks
from batch_orchestration_tests.support.builders import NOW, make_line
from batch_orchestration_tests.support.inbox_bench import InboxBench
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import make_feeding


class WindowBench(InboxBench):
    """An inbox where ten requests are a chunk, and of a batch 25 may be open, so two chunks."""

    def __init__(self, root: Path, **settings: Any) -> None:
        super().__init__(root, clock=time.time, **{"max_requests_per_batch": 25, **settings})

    def next_run(self, plan: BatchPlan) -> NeededRun:
        """Return the one run that the batch needs now."""
        verdict = dispatch(
            [self.store.batch(plan.batch_id)],
            [],
            reports=self.store.chunk_reports,
            chunks_per_run=500,
            most_requests=self.settings.max_requests_per_batch,
            now=NOW,
        )
        (needed,) = verdict.needed
        return needed

    def answer(self, plan: BatchPlan, engine: Engine | None = None) -> Iterator[CommittedChunk]:
        """Answer window after window, each by a run of its own; yield the chunks as they come."""
        engine = engine or ScriptedEngine()
        while (chunks := self.next_run(plan).chunks) is not None:
            yield from run_chunks(
                {plan.batch_id: chunks},
                engine=engine,
                folder=self.folder,
                store=self.store,
                run_id=f"run-{chunks[0]}-{chunks[-1]}",
                feeding=make_feeding(answer_settings=self.settings.answer_settings),
            )

    def deliver(self, plan: BatchPlan) -> AssemblyReport:
        """Write the files of the batch, whose requests all have an outcome."""
        return assemble(plan.batch_id, folder=self.folder, store=self.store, clock=lambda: NOW + 60)

    def numbers(self, plan: BatchPlan, name: str) -> list[int | None]:
        """Return of which request each line of a file of the outbox is."""
        path = self.folder.outbox_path(plan.batch_id) / name
        ids = [json.loads(line)["custom_id"] for line in path.read_bytes().splitlines()]
        return [custom_id and int(custom_id.removeprefix("request-")) for custom_id in ids]


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
