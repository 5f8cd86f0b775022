"""A data folder in which batches of which everything fails are run, paused and resumed."""

import time
from typing import Any

import msgspec

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.lifecycle import Halt
from batch_orchestration.core.outcomes import Failure, FailureCode, Outcome
from batch_orchestration.dispatch.run_planning import Dispatch, KnownRun, dispatch
from batch_orchestration.engines.base import Engine
from batch_orchestration.inference.run import CommittedChunk
from batch_orchestration.lifecycle.resumption import resume
from batch_orchestration.queue.halts import halt_in_force, halts_in_force
from batch_orchestration_tests.support.builders import make_input, make_plan
from batch_orchestration_tests.support.closing_bench import ClosingBench
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.turn_bench import TurnBench

#: What an engine says of each request of a batch with one wrong parameter.
REFUSAL = Failure(
    code=FailureCode.ENGINE_REFUSED, message="unknown parameter: 'tempreature'", status=400
)


def refusing(*texts: str) -> ScriptedEngine:
    """An engine that refuses whatever has one of these texts in it."""
    return ScriptedEngine(lambda body, times: refusal_of(body, *texts))


def refusal_of(body: bytes, *texts: str) -> Outcome | None:
    """The refusal of a body that has one of these texts in it."""
    return REFUSAL if any(text.encode() in body for text in texts) else None


class HaltingBench(ClosingBench, TurnBench):
    """Batches admitted now, ten requests a chunk unless said otherwise."""

    def admit(self, requests: int, **options: Any) -> BatchPlan:
        """A batch whose author said this about it."""
        content = make_input(requests)
        plan = make_plan(content)
        said = msgspec.structs.replace(plan.options, **options)
        plan = msgspec.structs.replace(plan, options=said, created_at=time.time())
        self.folder.write_plan(plan)
        self.folder.input_path(plan.batch_id).write_bytes(content)
        self.store.add_batch(plan, at=plan.created_at)
        return plan

    def run(self, plan: BatchPlan, engine: Engine, **how: Any) -> list[CommittedChunk]:
        """Run chunks under the default rate."""
        return super().run(plan, engine, **{"max_failure_rate": 0.5, **how})

    def halt(self, plan: BatchPlan) -> Halt | None:
        """Why the batch is paused."""
        return halt_in_force(self.folder, plan.batch_id)

    def go_on(self, plan: BatchPlan, **how: Any) -> None:
        """Resume a batch, as a person does."""
        how.setdefault("at", time.time())
        resume(plan.batch_id, folder=self.folder, store=self.store, actor="tester", **how)

    def asked(self, plan: BatchPlan) -> int:
        """How often a request of the batch was given to an engine, by its journals."""
        return sum(sum(state.attempts.values()) for state in self.journals(plan))

    def settled(self, plan: BatchPlan) -> int:
        """How many requests of the batch have an outcome in a journal."""
        return sum(len(state.settled) for state in self.journals(plan))

    def dispatched(self, *runs: KnownRun, chunks_per_run: int = 50) -> Dispatch:
        """What a tick of the sensor asks for."""
        batches = self.store.batches()
        return dispatch(
            batches,
            runs,
            reports=self.store.chunk_reports,
            chunks_per_run=chunks_per_run,
            most_requests=50_000,
            now=time.time(),
            halts=halts_in_force(self.folder, batches),
        )
