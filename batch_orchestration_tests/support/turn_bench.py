"""Several batches in one data folder and a queue over them: where tests of turns take place."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.outcomes import Outcome
from batch_orchestration.files.atomic import write_atomically
from batch_orchestration.queue.entries import EntryKind, EntryState, QueueEntry, QueueView
from batch_orchestration.queue.ordering import whole_points
from batch_orchestration_tests.support.builders import NOW, make_body, make_line, make_plan
from batch_orchestration_tests.support.scripted_engine import Script, ScriptedEngine
from batch_orchestration_tests.support.workbench import SETTINGS, Workbench


class PacedEngine(ScriptedEngine):
    """Takes its time, and remembers in which order it was asked."""

    def __init__(self, *arguments: Any, seconds: float = 0.004, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._seconds = seconds
        self.asked: list[str] = []
        self._also: list[Script] = []

    def also(self, script: Script) -> None:
        """Let another script see each request, too."""
        self._also.append(script)

    async def answer(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        self.asked.append(request_id)
        for script in self._also:
            script(body, 0)
        await asyncio.sleep(self._seconds)
        return await super().answer(endpoint, body, request_id=request_id)

    def places_of(self, plan: BatchPlan) -> list[int]:
        """When the requests of a batch were asked, counted in requests."""
        return [n for n, asked in enumerate(self.asked) if asked.startswith(plan.batch_id)]


class TurnBench(Workbench):
    """A workbench with several batches and their queue."""

    def batch(self, name: str, requests: int, *, requests_per_chunk: int = 10) -> BatchPlan:
        """Admit a batch whose requests tell its name."""
        lines = [make_line(n, body=make_body(f"{name} {n}.")) for n in range(requests)]
        content = b"".join(lines)
        plan = make_plan(
            content,
            file_name=f"{name}.jsonl",
            requests_per_chunk=requests_per_chunk,
            settings=dict(SETTINGS),
        )
        self.folder.write_plan(plan)
        self.folder.input_path(plan.batch_id).write_bytes(content)
        self.store.add_batch(plan, at=NOW)
        return plan

    def queue(self, *entries: QueueEntry, at: float | None = None) -> None:
        """Write the queue: these entries, in their order."""
        placed = [
            msgspec.structs.replace(entry, place=place)
            for place, entry in enumerate(entries, start=1)
        ]
        view = QueueView(at=time.time() if at is None else at, entries=tuple(placed))
        write_atomically(self.folder.queue, msgspec.json.encode(view))

    def committed(self, plan: BatchPlan) -> set[int]:
        """Numbers of the committed chunks."""
        return set(self.store.chunk_reports(plan.batch_id))

    def answered_by(self, plan: BatchPlan) -> set[str]:
        """The runs that answered a batch."""
        return {settled.provenance.run_id for settled in self.store.settled(plan.batch_id)}


def entry(plan: BatchPlan, *, effective: float = 0.0, **fields: Any) -> QueueEntry:
    """An admitted batch in the queue."""
    values: dict[str, Any] = {
        "kind": EntryKind.BATCH,
        "id": plan.batch_id,
        "batch_id": plan.batch_id,
        "source": "inbox",
        "priority": whole_points(effective),
        "effective_priority": effective,
        "state": EntryState.ADMITTED,
        "place": 0,
        "settings_hash": plan.settings_hash,
    }
    return QueueEntry(**{**values, **fields})


def runs_of(asked: Sequence[str]) -> list[str]:
    """The ids of the batches as they follow each other, without repetitions."""
    ids = [request_id.rsplit("-", 2)[0] for request_id in asked]
    return [one for n, one in enumerate(ids) if n == 0 or ids[n - 1] != one]
