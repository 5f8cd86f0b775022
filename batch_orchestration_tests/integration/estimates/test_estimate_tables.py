"""The tables of estimates, and the measurement of an engine from its answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batch_orchestration.core.outcomes import Usage
from batch_orchestration.estimates.costs import Source
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration.estimates.estimate import AnsweredRequest
from batch_orchestration.estimates.scores import Score
from batch_orchestration.estimates.tables import CachedEngineInfo, EstimateTables
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import (
    NOW,
    make_completion,
    make_failure,
    make_input,
    make_plan,
    make_provenance,
    make_settled,
)
from batch_orchestration_tests.support.estimates import make_estimate, make_measurement

IN_FORCE = EngineInForce(kind="vllm", model="m", device="cpu")


@pytest.fixture
def tables(store: Store) -> EstimateTables:
    return EstimateTables(store)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "batch.duckdb", deadline_seconds=5)


def make_score(batch_id: str = "b", **fields: Any) -> Score:
    values: dict[str, Any] = {
        "batch_id": batch_id,
        "scored_at": NOW + 60,
        "estimate": make_estimate(),
        "actual_prompt_tokens": 2,
        "actual_completion_tokens": 3,
        "actual_seconds": 125.0,
    }
    return Score(**{**values, **fields})


def settle(store: Store, spans: list[tuple[str, float, float]]) -> str:
    """Commit a batch of which each request began and ended at these seconds, in these runs."""
    plan = make_plan(make_input(len(spans)), requests_per_chunk=len(spans))
    store.add_batch(plan, at=NOW)
    requests = [
        make_settled(
            index,
            make_completion(
                latency_seconds=ended - began,
                usage=Usage(prompt_tokens=10, completion_tokens=index),
            ),
            settled_at=NOW + ended,
            provenance=make_provenance(run),
        )
        for index, (run, began, ended) in enumerate(spans)
    ]
    store.commit_chunk(
        plan.batch_id,
        0,
        requests,
        run_id="run-1",
        at=NOW,
        seconds=1.0,
        memory_level="as configured",
    )
    return plan.batch_id


def test_a_run_is_measured_while_the_engine_has_a_request_of_the_batch(
    store: Store, tables: EstimateTables
) -> None:
    batch_id = settle(
        store, [("run-1", 0, 4), ("run-1", 1, 3), ("run-1", 2, 6), ("run-1", 100, 101)]
    )

    (run,) = tables.measure(batch_id, make_estimate(at_a_time=8))

    assert run.seconds == pytest.approx(7.0, abs=0.001)
    assert (run.requests, run.prompt_tokens, run.completion_tokens, run.longest) == (4, 40, 6, 3)
    assert (run.memory_level, run.at_a_time, run.source) == ("as configured", 8, Source.HISTORY)
    assert (run.model, run.device) == ("m", "cpu")


def test_each_run_is_measured_separately(store: Store, tables: EstimateTables) -> None:
    batch_id = settle(store, [("run-1", 0, 2), ("run-2", 1, 4)])

    first, second = tables.measure(batch_id, make_estimate())

    assert (first.run_id, second.run_id) == ("run-1", "run-2")
    assert (first.seconds, second.seconds) == (pytest.approx(2.0), pytest.approx(3.0))


def test_a_batch_without_an_answer_has_no_runs(store: Store, tables: EstimateTables) -> None:
    plan = make_plan(make_input(1))
    store.add_batch(plan, at=NOW)
    failed = [make_settled(0, make_failure())]
    store.commit_chunk(plan.batch_id, 0, failed, run_id="r", at=NOW, seconds=1.0)

    assert tables.measure(plan.batch_id, make_estimate()) == []


def test_a_score_is_stored_once_with_its_runs_and_answers(
    store: Store, tables: EstimateTables
) -> None:
    answered = AnsweredRequest(
        shape="chat, text, long", characters=9, prompt_tokens=3, completion_tokens=2, cut=True
    )
    score = make_score()

    for again in (score, msgspec.structs.replace(score, actual_seconds=99.0)):
        tables.add_score(again, [make_measurement()], [answered] * 3)

    assert tables.score_of("b") == score
    assert tables.score_of("other") is None
    assert len(tables.measurements(IN_FORCE)) == 1
    assert (tables.answered("m"), tables.answered("other")) == ([answered] * 3, [])
    ((error, inside),) = store.query("SELECT error, inside FROM estimates")[1]
    assert (error, inside) == (pytest.approx(0.2), True)


def test_an_estimate_is_stored_once_and_may_have_no_seconds(
    store: Store, tables: EstimateTables
) -> None:
    first = make_estimate(seconds=None)

    tables.add_estimate("b", first)
    tables.add_estimate("b", make_estimate())
    score = make_score(estimate=first)
    tables.add_score(score, [], [])

    assert tables.score_of("b") == score
    assert store.query("SELECT estimate->>'$.seconds.mid' FROM estimates")[1] == [(None,)]


def test_scores_are_those_of_the_latest_batches_up_to_a_time(tables: EstimateTables) -> None:
    for number in range(4):
        tables.add_score(make_score(f"b{number}", scored_at=NOW + number), [], [])

    assert [score.batch_id for score in tables.scores(limit=2, until=NOW + 2)] == ["b2", "b1"]
    assert [score.batch_id for score in tables.scores(limit=2)] == ["b3", "b2"]
    assert [score.batch_id for score in tables.scores_since(NOW + 1)] == ["b2", "b3"]


def test_measurements_are_those_of_the_memory_level_used_last(
    store: Store, tables: EstimateTables
) -> None:
    older = make_measurement(memory_level="max_num_seqs 8", measured_at=NOW - 100)
    tables.add_measurements([older, make_measurement()])

    assert tables.measurements(IN_FORCE) == [make_measurement()]
    assert tables.measurements(replace(IN_FORCE, device="cuda")) == []
    assert store.query(
        "SELECT prompt_tokens_per_second, completion_tokens_per_second, requests_per_second"
        " FROM benchmarks WHERE memory_level = 'as configured'"
    )[1] == [(50.0, 10.0, 2.0)]


def test_the_latest_report_of_an_engine_replaces_the_former_one(tables: EstimateTables) -> None:
    info = CachedEngineInfo(
        models=("a", "b"), max_model_len=2048, kv_cache_tokens=None, start_seconds=41.5, seen_at=NOW
    )

    for reported in (msgspec.structs.replace(info, max_model_len=1024), info):
        tables.put_engine_info(IN_FORCE, reported)

    assert tables.engine_info(IN_FORCE) == info
    assert tables.engine_info(replace(IN_FORCE, args={"seed": 1})) is None
