"""Engines that run out of memory go on with gentler settings; who exhausts it alone is found."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import (
    EngineDied,
    EngineStartFailed,
    Exhaustion,
    MemoryShortage,
)
from batch_orchestration.core.outcomes import Failure, FailureCode
from batch_orchestration.engines.memory_fallback import MemoryFallback, MemoryLevel
from batch_orchestration.engines.memory_level_file import MemoryLevelFile
from batch_orchestration.engines.simulated.engine import SimulatedEngine
from batch_orchestration.inference.faults.oom_recovery import remembered_fallback
from batch_orchestration_tests.support.builders import (
    NOW,
    make_body,
    make_line,
    make_plan,
    write_plan,
)
from batch_orchestration_tests.support.scripted_engine import ScriptedEngine
from batch_orchestration_tests.support.workbench import SETTINGS, Workbench

IN_FLIGHT = 64


class Deployment(Workbench):
    """A workbench whose simulated engines remember their levels, as those of Dagster's runs do."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.now = NOW
        self.engines: list[SimulatedEngine] = []

    def set_conditions(self, **conditions: Any) -> None:
        (self.folder.root / "simulated.json").write_text(json.dumps(conditions))

    def admitted_with(self, simulate: dict[int, dict[str, Any]], *, requests: int) -> BatchPlan:
        """A batch some of whose requests ask for something to go wrong."""
        content = b"".join(
            make_line(n, body=make_body(f"question {n}", model="simulated-model", **asked))
            for n in range(requests)
            for asked in [{"simulate": simulate[n]} if n in simulate else {}]
        )
        plan = make_plan(content, requests_per_chunk=100)
        write_plan(self.folder, plan)
        self.folder.input_path(plan.batch_id).write_bytes(content)
        self.store.add_batch(plan, at=NOW)
        return plan

    def run_simulated(self, plan: BatchPlan, run_id: str = "run-1", **policy: Any) -> int:
        """Run the batch with a new engine; return how often that one was started."""
        fallback = remembered_fallback(
            MemoryLevel(max_num_seqs=IN_FLIGHT),
            memory=MemoryLevelFile(self.folder.memory_levels),
            model="simulated-model",
            device="cpu",
            args={},
            retry_seconds=60,
            clock=lambda: self.now,
        )
        engine = SimulatedEngine(
            log_path=self.folder.logs / f"{run_id}.log",
            control_path=self.folder.root / "simulated.json",
            fallback=fallback,
        )
        try:
            defaults = {"in_flight": IN_FLIGHT, "engine_restarts": 30}
            self.run(plan, engine, run_id=run_id, **(defaults | policy))
        finally:
            engine.stop()
        return engine.starts

    def levels(self, plan: BatchPlan) -> list[str | None]:
        """The level of each committed chunk, in order."""
        return [r.memory_level for _, r in sorted(self.store.chunk_reports(plan.batch_id).items())]

    def failures_of(self, plan: BatchPlan) -> dict[int, str]:
        return {s.index: s.outcome.code for s in self.store.failures(plan.batch_id)}


@pytest.fixture
def bench(tmp_path: Path) -> Deployment:
    return Deployment(tmp_path)


def another_batch(bench: Deployment) -> Iterator[BatchPlan]:
    """Batches of other content, one after the other."""
    for requests in range(201, 300):
        yield bench.admitted_with({}, requests=requests)


def test_a_batch_completes_on_the_level_that_memory_allows(bench: Deployment) -> None:
    bench.set_conditions(latency_seconds=0.05, dies_above=20)
    plan = bench.admitted_with({}, requests=300)

    starts = bench.run_simulated(plan)

    assert bench.indices(plan) == list(range(300))
    assert bench.failures_of(plan) == {}
    assert starts == 3
    assert bench.levels(plan) == ["max-num-seqs 16"] * 3


def test_the_deaths_on_the_way_down_cost_no_request_an_attempt_or_its_innocence(
    bench: Deployment,
) -> None:
    bench.set_conditions(latency_seconds=0.05, dies_above=20)
    plan = bench.admitted_with({}, requests=100)

    bench.run_simulated(plan)

    assert all(not settled.failed_attempts for settled in bench.store.settled(plan.batch_id))
    journal = bench.folder.journal_path(plan.batch_id, 0).read_text()
    assert "suspected" not in journal


def test_the_next_run_begins_where_it_worked_and_later_one_higher(bench: Deployment) -> None:
    bench.set_conditions(latency_seconds=0.05, dies_above=20)
    batches = another_batch(bench)
    first, second, third, fourth = (next(batches) for _ in range(4))
    starts = [bench.run_simulated(first, "run-1"), bench.run_simulated(second, "run-2")]

    bench.now += 61
    starts.append(bench.run_simulated(third, "run-3"))
    bench.set_conditions()
    bench.now += 61
    starts.append(bench.run_simulated(fourth, "run-4"))

    assert starts == [3, 1, 2, 1]
    assert set(bench.levels(second)) == {"max-num-seqs 16"}
    assert bench.levels(third)[-1] == "max-num-seqs 16"
    assert set(bench.levels(fourth)) == {"max-num-seqs 32"}


def test_a_request_that_exhausts_the_memory_alone_is_found_at_the_bottom(
    bench: Deployment,
) -> None:
    bench.set_conditions(latency_seconds=0.01)
    plan = bench.admitted_with({150: {"exhaust_memory": True}}, requests=400)

    starts = bench.run_simulated(plan)

    assert bench.failures_of(plan) == {150: FailureCode.OUT_OF_MEMORY}
    assert bench.indices(plan) == list(range(400))
    #: Three levels (64 to 8 sequences), one narrower window, one death there, three halvings of 8.
    assert starts <= 1 + 3 + 1 + 1 + 3
    [letter] = bench.store.failures(plan.batch_id)
    assert "CUDA out of memory" in letter.outcome.message


def test_a_culprit_does_not_slow_down_the_rest_of_the_batch(bench: Deployment) -> None:
    bench.set_conditions(latency_seconds=0.05)
    plan = bench.admitted_with({10: {"exhaust_memory": True}}, requests=700)

    bench.run_simulated(plan)

    # Its chunk is complete once it is convicted; the others may be before.
    assert bench.failures_of(plan) == {10: FailureCode.OUT_OF_MEMORY}
    assert bench.levels(plan)[0] == "as configured"
    assert MemoryLevelFile(bench.folder.memory_levels)._read() == {}


def test_the_level_count_as_restarts(bench: Deployment) -> None:
    bench.set_conditions(latency_seconds=0.05, dies_above=1)
    plan = bench.admitted_with({}, requests=100)

    with pytest.raises(EngineDied, match="BATCH_ENGINE_RESTARTS"):
        bench.run_simulated(plan, engine_restarts=1)


def test_a_person_who_kills_the_engine_moves_no_level(bench: Deployment) -> None:
    plan = bench.admitted_with({5: {"die": True, "fail_first": 1}}, requests=100)

    bench.run_simulated(plan)

    assert bench.levels(plan) == ["as configured"]
    assert bench.indices(plan) == list(range(100))


# Starts: the scripted engine runs in this process and says at once how they end.

OUT_OF_CACHE = Exhaustion(
    shortage=MemoryShortage.CACHE, evidence="To serve at least one request …", max_model_len=100_000
)
CONFIGURED = MemoryLevel(max_num_seqs=64, max_model_len=100_000, gpu_memory_utilization=0.9)


class PickyEngine(ScriptedEngine):
    """Starts only on levels that please it."""

    def __init__(
        self, fallback: MemoryFallback, refuses: Callable[[MemoryLevel], Exception | None]
    ) -> None:
        super().__init__(fallback=fallback)
        self._refuses = refuses
        self.tried: list[MemoryLevel] = []

    async def start(self):
        self.fallback.fit()
        if not self.alive:
            self.tried.append(self.fallback.level)
            if (refusal := self._refuses(self.fallback.level)) is not None:
                raise refusal
        return await super().start()


@pytest.mark.parametrize("present", [{}, {"model": "another"}], ids=["as planned", "forced"])
def test_a_start_without_room_for_the_context_is_repeated_with_what_the_batch_needs(
    tmp_path: Path, present: dict[str, str]
) -> None:
    bench = Workbench(tmp_path)
    plan = bench.admitted(30, settings={**SETTINGS, "max_tokens_cap": 500})
    engine = PickyEngine(
        MemoryFallback(CONFIGURED),
        lambda level: (
            EngineStartFailed("too long", exhaustion=OUT_OF_CACHE)
            if level.max_model_len > 50_000
            else None
        ),
    )

    bench.run(
        plan,
        engine,
        max_tokens_cap=500,
        answer_settings={**plan.settings, **present},
        force=bool(present),
    )

    assert bench.indices(plan) == list(range(30))
    assert 500 < engine.tried[-1].max_model_len < 3000
    assert len(engine.tried) == 2
    [report, *_] = bench.store.chunk_reports(plan.batch_id).values()
    assert re.fullmatch(r"max-model-len \d+", report.memory_level)


def test_a_context_that_the_batch_needs_is_not_cut(tmp_path: Path) -> None:
    """Without a limit on the answer every request may need all of it."""
    bench = Workbench(tmp_path)
    plan = bench.admitted(30)
    engine = PickyEngine(
        MemoryFallback(CONFIGURED),
        lambda level: EngineStartFailed("too long", exhaustion=OUT_OF_CACHE),
    )

    with pytest.raises(EngineStartFailed, match="too long"):
        bench.run(plan, engine, engine_restarts=30)

    assert {level.max_model_len for level in engine.tried} == {100_000}
    assert engine.tried[-1].max_num_seqs == 8


def test_a_remembered_level_that_does_not_start_is_given_up(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    plan = bench.admitted(30)
    remembered = MemoryLevel(max_num_seqs=32, max_model_len=100_000, gpu_memory_utilization=0.81)
    engine = PickyEngine(
        MemoryFallback(CONFIGURED, descent=[remembered]),
        lambda level: EngineStartFailed("unknown flag") if level == remembered else None,
    )

    bench.run(plan, engine)

    assert engine.tried == [remembered, CONFIGURED]
    assert bench.indices(plan) == list(range(30))


def test_suspects_that_exhaust_the_memory_together_stay_suspects(tmp_path: Path) -> None:
    """One request kills the engine; eleven at a time exhaust its memory."""
    bench = Workbench(tmp_path)
    plan = bench.admitted(64, requests_per_chunk=64)
    fallback = MemoryFallback(MemoryLevel(max_num_seqs=32))
    exhaustion = Exhaustion(shortage=MemoryShortage.WORK, evidence="CUDA out of memory")
    killed = []

    def script(body: bytes, submitted: int):
        if b'question 3"' in body:
            killed.append(True)
            return EngineDied("killed by 3")
        if len(killed) == 1 and fallback.level.max_num_seqs > 16:
            return EngineDied("CUDA out of memory", exhaustion=exhaustion)
        return None

    bench.run(plan, ScriptedEngine(script, fallback=fallback), in_flight=32, engine_restarts=30)

    failed = {s.index: s.outcome for s in bench.store.failures(plan.batch_id)}
    assert {index: failure.code for index, failure in failed.items()} == {
        3: FailureCode.ENGINE_KILLED
    }
    assert all(isinstance(failure, Failure) for failure in failed.values())
    assert bench.indices(plan) == list(range(64))
