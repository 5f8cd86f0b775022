"""What the store keeps about estimates, and how it tells an engine's speed from its answers."""

from pathlib import Path

import msgspec
import pytest

from batch_orchestration.core.outcomes import Usage
from batch_orchestration.estimates.costs import Source
from batch_orchestration.estimates.estimate import AnsweredRequest, Band, Basis, Estimate
from batch_orchestration.estimates.scores import Score
from batch_orchestration.estimates.tables import CachedEngineInfo, EngineRun, EstimateTables
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

ENGINE = {"engine": "vllm", "model": "m", "device": "cpu"}
BAND = Band(low=1.0, mid=2.0, high=4.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "batch.duckdb", deadline_seconds=5)


def make_estimate(**fields: object) -> Estimate:
    values = {
        "requests": 9,
        "prompt_tokens": BAND,
        "completion_tokens": BAND,
        "basis": Basis.LEARNED,
        "seconds": BAND,
        "created_at": NOW,
    }
    return Estimate(**{**values, **fields})  # type: ignore[arg-type]


def make_score(batch_id: str = "b", **fields: object) -> Score:
    values = {
        "batch_id": batch_id,
        "scored_at": NOW + 60,
        "requests": 9,
        "basis": Basis.LEARNED,
        "expected_prompt_tokens": BAND,
        "actual_prompt_tokens": 2,
        "expected_tokens": BAND,
        "actual_tokens": 3,
        "expected_seconds": BAND,
        "actual_seconds": 2.5,
    }
    return Score(**{**values, **fields})  # type: ignore[arg-type]


def make_run(**fields: object) -> EngineRun:
    values = {
        "run_id": "r",
        "engine": "vllm",
        "memory_level": "as configured",
        "source": Source.CALIBRATION,
        "requests": 4,
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "longest": 8,
        "at_a_time": 2,
        "seconds": 2.0,
        "measured_at": NOW,
    }
    return EngineRun(**{**values, **fields})  # type: ignore[arg-type]


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


def test_only_the_time_counts_during_which_the_engine_had_a_request(store: Store) -> None:
    batch_id = settle(
        store, [("run-1", 0, 4), ("run-1", 1, 3), ("run-1", 2, 6), ("run-1", 100, 101)]
    )

    (run,) = EstimateTables(store).runs_of(batch_id, at_a_time=8)

    assert run.seconds == pytest.approx(7.0, abs=0.001)
    assert (run.requests, run.prompt_tokens, run.completion_tokens, run.longest) == (4, 40, 6, 3)
    assert (run.memory_level, run.at_a_time, run.source) == ("as configured", 8, Source.HISTORY)


def test_each_run_is_measured_by_itself(store: Store) -> None:
    batch_id = settle(store, [("run-1", 0, 2), ("run-2", 1, 4)])

    first, second = EstimateTables(store).runs_of(batch_id, at_a_time=8)

    assert (first.run_id, second.run_id) == ("run-1", "run-2")
    assert (first.seconds, second.seconds) == (pytest.approx(2.0), pytest.approx(3.0))


def test_a_batch_without_an_answer_has_no_runs(store: Store) -> None:
    plan = make_plan(make_input(1))
    store.add_batch(plan, at=NOW)
    failed = [make_settled(0, make_failure())]
    store.commit_chunk(plan.batch_id, 0, failed, run_id="r", at=NOW, seconds=1.0)

    assert EstimateTables(store).runs_of(plan.batch_id, at_a_time=8) == []


def test_a_score_comes_back_as_it_was_given_and_only_once(store: Store) -> None:
    tables, score = EstimateTables(store), make_score()
    tables.add_estimate("b", make_estimate())

    tables.score(score, [make_run()], model="m", device="cpu", answered=[])
    later = msgspec.structs.replace(score, actual_seconds=99.0)
    tables.score(later, [make_run()], model="m", device="cpu", answered=[])

    assert tables.score_of("b") == score
    assert len(tables.runs(**ENGINE)) == 1
    ((error, inside),) = store.query("SELECT error, inside FROM estimates")[1]
    assert (error, inside) == (pytest.approx(0.2), True)


def test_an_estimate_is_kept_once_and_may_have_no_seconds(store: Store) -> None:
    tables = EstimateTables(store)

    tables.add_estimate("b", make_estimate(seconds=None))
    tables.add_estimate("b", make_estimate())
    score = make_score(expected_seconds=None)
    tables.score(score, [], model="m", device="cpu", answered=[])

    assert tables.score_of("b") == score
    assert store.query("SELECT count(*) FROM estimates WHERE seconds_mid IS NULL")[1] == [(1,)]


def test_scores_are_those_of_the_last_batches_up_to_a_moment(store: Store) -> None:
    for number in range(4):
        EstimateTables(store).add_estimate(f"b{number}", make_estimate())
        score = make_score(f"b{number}", scored_at=NOW + number)
        EstimateTables(store).score(score, [], model="m", device="cpu", answered=[])

    found = EstimateTables(store).scores(limit=2, until=NOW + 2)

    assert [score.batch_id for score in found] == ["b2", "b1"]


def test_answers_are_remembered_by_model(store: Store) -> None:
    answered = AnsweredRequest(
        shape="chat, text, long", characters=9, prompt_tokens=3, completion_tokens=2, cut=True
    )
    EstimateTables(store).add_estimate("b", make_estimate())
    EstimateTables(store).score(make_score(), [], model="m", device="cpu", answered=[answered] * 3)

    assert EstimateTables(store).answered("m") == [answered] * 3
    assert EstimateTables(store).answered("other") == []


def test_measurements_are_those_of_the_memory_settings_used_last(store: Store) -> None:
    EstimateTables(store).add_runs(
        [
            make_run(memory_level="max_num_seqs 8", measured_at=NOW - 100),
            make_run(measured_at=NOW),
        ],
        model="m",
        device="cpu",
    )

    (run,) = EstimateTables(store).runs(**ENGINE)

    assert run == make_run(measured_at=NOW)
    assert EstimateTables(store).runs(**{**ENGINE, "device": "cuda"}) == []
    ((prompt, completion, requests),) = store.query(
        "SELECT prompt_tokens_per_second, completion_tokens_per_second, requests_per_second"
        " FROM benchmarks WHERE memory_level = 'as configured'"
    )[1]
    assert (prompt, completion, requests) == (50.0, 10.0, 2.0)


def test_what_an_engine_says_replaces_what_it_said_before(store: Store) -> None:
    facts = CachedEngineInfo(
        models=("a", "b"), max_model_len=2048, kv_cache_tokens=None, start_seconds=41.5, seen_at=NOW
    )
    older = msgspec.structs.replace(facts, max_model_len=1024)

    for said in (older, facts):
        EstimateTables(store).put_facts(said, **ENGINE, args_hash="h")

    assert EstimateTables(store).facts(**ENGINE, args_hash="h") == facts
    assert EstimateTables(store).facts(**ENGINE, args_hash="other") is None
