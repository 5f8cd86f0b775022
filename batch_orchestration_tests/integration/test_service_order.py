"""The order of service of admitted batches, from a real store."""

from pathlib import Path

import pytest

from batch_orchestration.domain.batches import BatchOptions
from batch_orchestration.domain.ordering import OrderPolicy
from batch_orchestration.services.service_order import (
    SHARE_SECONDS,
    TYPICAL_TOKENS,
    batch_candidate,
    order_batches,
)
from batch_orchestration.storage.store import Store
from batch_orchestration_tests.builders import NOW, make_input, make_plan, make_settled_chunk

POLICY = OrderPolicy()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "batch.duckdb")


def add(store: Store, name: str, *, at: float = NOW, **options) -> str:
    plan = make_plan(
        make_input(20),
        file_name=f"{name}.jsonl",
        options=BatchOptions(metadata={"n": name}, **options),
    )
    store.add_batch(plan, at=at)
    return plan.batch_id


def commit(store: Store, batch_id: str, *, at: float) -> None:
    plan = make_plan(make_input(20))
    store.commit_chunk(
        batch_id, 0, make_settled_chunk(plan.chunks[0]), run_id="run-1", at=at, seconds=1.0
    )


def test_a_candidate_carries_what_the_order_needs(store: Store) -> None:
    batch_id = add(store, "one", priority=3, completion_window="2h")

    candidate = batch_candidate(store.batch(batch_id))

    assert (candidate.id, candidate.priority) == (batch_id, 3)
    assert candidate.deadline == NOW + 7200
    assert candidate.work == 20 * TYPICAL_TOKENS


def test_what_is_left_counts_in_the_tokens_that_the_batch_took_so_far(store: Store) -> None:
    batch_id = add(store, "one")
    commit(store, batch_id, at=NOW)

    assert batch_candidate(store.batch(batch_id)).work == 10 * (7 + 3)


def test_only_what_was_committed_of_late_counts_as_served(store: Store) -> None:
    batch_id = add(store, "one")
    commit(store, batch_id, at=NOW)

    assert store.tokens_since(NOW - SHARE_SECONDS) == {batch_id: 100}
    assert store.tokens_since(NOW + 1) == {}


def test_batches_come_by_priority_then_deadline(store: Store) -> None:
    late = add(store, "late")
    soon = add(store, "soon", completion_window="1h")
    high = add(store, "high", priority=1)

    places = order_batches(store.batches(), store, now=NOW, policy=POLICY)

    assert [place.candidate.id for place in places] == [high, soon, late]
    assert order_batches([], store, now=NOW, policy=POLICY) == []
