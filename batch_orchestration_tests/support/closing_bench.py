"""A data folder in which batches are run, stopped in the middle, closed out and resumed."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.lifecycle import EarlyEnd, Resumption
from batch_orchestration.delivery.assembly import Delivery, assemble
from batch_orchestration.engines.base import Engine
from batch_orchestration.files.journal import JournalState, replay_journal
from batch_orchestration.inference.run import CommittedChunk
from batch_orchestration.lifecycle.cancellation import Cancellation, cancel, end_overdue
from batch_orchestration.lifecycle.close_out import fail_unanswered
from batch_orchestration.lifecycle.resumption import resume
from batch_orchestration_tests.support.builders import make_input, make_plan, write_plan
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine, StickingEngine
from batch_orchestration_tests.support.workbench import Workbench


class ClosingBench(Workbench):
    """A batch is admitted now, with a window of 24 hours unless said otherwise."""

    def admit_now(
        self, requests: int, *, window: str = "24h", at: float | None = None
    ) -> BatchPlan:
        """A batch of ten requests a chunk that was admitted just now."""
        content = make_input(requests)
        plan = make_plan(content, requests_per_chunk=10)
        options = msgspec.structs.replace(plan.options, completion_window=window)
        admitted_at = time.time() if at is None else at
        plan = msgspec.structs.replace(plan, options=options, created_at=admitted_at)
        write_plan(self.folder, plan)
        self.folder.input_path(plan.batch_id).write_bytes(content)
        self.store.add_batch(plan, at=plan.created_at)
        return plan

    def let_expire(self, plan: BatchPlan) -> None:
        """Let the window of a batch be over."""
        over = Resumption(at=0.0, actor="tester", deadline=time.time() - 1)
        self.folder.resumption(plan.batch_id).write(over)

    def cancel(self, plan: BatchPlan, *, reason: str = "no longer needed") -> Cancellation:
        """Cancel a batch, as a person does."""
        return cancel(
            plan.batch_id,
            folder=self.folder,
            store=self.store,
            actor="tester",
            reason=reason,
            at=time.time(),
        )

    def resume(self, plan: BatchPlan, *, window: str | None = None) -> Resumption:
        """Go on with a batch, as a person does."""
        return resume(
            plan.batch_id,
            folder=self.folder,
            store=self.store,
            actor="tester",
            completion_window=window,
            at=time.time(),
        )

    def run_until_stuck(
        self,
        plan: BatchPlan,
        engine: StickingEngine,
        then: Callable[[], object],
        *,
        numbers: Sequence[int] | None = None,
    ) -> tuple[list[CommittedChunk], float]:
        """Run chunks; do `then` once requests stick; return commits and seconds since then."""
        began = [0.0]

        def wait_and_do() -> None:
            while engine.stuck < 8:
                time.sleep(0.01)
            began[0] = time.monotonic()
            then()

        with _thread(wait_and_do):
            commits = self.run(plan, engine, numbers=numbers)
        return commits, time.monotonic() - began[0]

    def deliver(self, plan: BatchPlan, *, run_id: str = "deliver-1") -> Delivery:
        """What the run of `batch_output` does."""
        for _ in fail_unanswered(
            plan.batch_id, folder=self.folder, store=self.store, run_id=run_id, clock=time.time
        ):
            pass
        return assemble(
            plan.batch_id, folder=self.folder, store=self.store, clock=time.time, actor=run_id
        )

    def finish(self, plan: BatchPlan, engine: Engine | None = None) -> Delivery:
        """Run what is pending, and deliver."""
        self.run(plan, engine or ScriptedEngine(), run_id="run-2")
        return self.deliver(plan)

    def look(
        self, *, terminated: str | None = None, doubt: str | None = None
    ) -> dict[str, EarlyEnd]:
        """What a tick of the sensor does about ends."""
        return end_overdue(
            self.store.batches(),
            folder=self.folder,
            store=self.store,
            terminated=lambda batch_id: terminated,
            actor="sensor",
            now=time.time(),
            doubt=doubt,
        )

    def status(self, plan: BatchPlan) -> str:
        """The batch's status in the store."""
        return str(self.store.batch(plan.batch_id).status)

    def history(self, plan: BatchPlan) -> list[tuple[str, str]]:
        """Status and actor of each event after admission."""
        events = self.store.batch_events(plan.batch_id)[2:]
        return [(str(event.to_status), event.actor) for event in events]

    def lines(self, plan: BatchPlan, name: str) -> list[dict[str, Any]]:
        """Lines of a file in the outbox."""
        path = self.folder.outbox_path(plan.batch_id) / name
        return [json.loads(line) for line in path.read_bytes().splitlines()]

    def journals(self, plan: BatchPlan) -> list[JournalState]:
        """What the journals say."""
        return [
            replay_journal(
                self.folder.journal_path(plan.batch_id, chunk.number), plan.batch_id, chunk.number
            )
            for chunk in plan.chunks
        ]


@contextmanager
def _thread(work: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield
    thread.join(5)
    assert not thread.is_alive()
