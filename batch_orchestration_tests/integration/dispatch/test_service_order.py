"""The order of service of admitted batches, from a real store."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.dispatch.queue_building import (
    SHARE_SECONDS,
    in_order_of_service,
    run_priorities,
    served_of_late,
)
from batch_orchestration.lifecycle.resumption import resume
from batch_orchestration.queue.entries import EntryKind, EntryState, Pause, QueueEntry, QueueView
from batch_orchestration.queue.files import read_queue
from batch_orchestration.queue.pause import pause, unpause
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import (
    NOW,
    make_input,
    make_plan,
    make_settled_chunk,
)
from batch_orchestration_tests.support.deployment import Deployment


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with closing(Deployment(tmp_path)) as deployment:
        yield deployment


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "batch.duckdb")


def queued(batch_id: str, effective: float, place: int) -> QueueEntry:
    return QueueEntry(
        kind=EntryKind.BATCH,
        id=batch_id,
        batch_id=batch_id,
        source="inbox",
        priority=0,
        effective_priority=effective,
        state=EntryState.ADMITTED,
        place=place,
    )


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


def test_only_what_was_committed_of_late_counts_as_served(store: Store) -> None:
    batch_id = add(store, "one")
    commit(store, batch_id, at=NOW)

    assert store.tokens_since(NOW - SHARE_SECONDS) == {batch_id: 100}
    assert store.tokens_since(NOW + 1) == {}
    assert served_of_late(store, now=NOW) == {"inbox": 100.0}


def test_batches_come_as_they_stand_in_the_queue_and_their_runs_have_its_points(
    store: Store,
) -> None:
    first, second, unseen = (add(store, name) for name in ("first", "second", "a-unseen"))
    view = QueueView(at=NOW, entries=(queued(second, 12.7, 1), queued(first, -0.3, 3)))

    ordered = in_order_of_service(store.batches(), view)

    assert [batch.batch_id for batch in ordered] == [second, first, unseen]
    assert run_priorities(view) == {second: 12, first: -1}


def test_a_tick_writes_the_queue_and_asks_for_runs_in_its_order(deployment: Deployment) -> None:
    """Those of more urgent batches first, with whole points as Dagster's priority."""
    low = deployment.admit("low.jsonl", make_input(12))
    high = deployment.admit("high/urgent.jsonl", make_input(13))

    requests = deployment.requests("dispatch_sensor")

    assert [request.tags["batch"] for request in requests] == [high, low]
    assert [request.tags["dagster/priority"] for request in requests] == ["10", "0"]
    view = read_queue(deployment.folder)
    assert view is not None
    assert [(entry.batch_id, entry.place) for entry in view.entries] == [(high, 1), (low, 2)]
    assert "priority 10 and" in view.entries[0].detail


def test_while_the_queue_is_paused_no_run_is_asked_for(deployment: Deployment) -> None:
    deployment.admit("a.jsonl", make_input(12))
    pause(deployment.folder, Pause(at=NOW, actor="somebody"))

    assert "somebody paused the queue" in deployment.reason("dispatch_sensor")
    unpause(deployment.folder)
    assert len(deployment.requests("dispatch_sensor")) == 1


def test_a_resumed_batch_stands_in_the_queue_with_its_new_deadline(deployment: Deployment) -> None:
    """By the old one, which is over, it would be overdue and go before everyone else."""
    deployment.drop("late.jsonl.meta.json", b'{"completion_window": "1s"}')
    batch_id = deployment.admit("late.jsonl", make_input(12))
    time.sleep(1.1)
    (delivering,) = deployment.requests("dispatch_sensor")
    assert deployment.run(delivering).success

    resumption = resume(
        batch_id, folder=deployment.folder, store=deployment.store, actor="tester",
        completion_window="2h", at=time.time(),
    )  # fmt: skip
    assert len(deployment.requests("dispatch_sensor")) == 1

    view = read_queue(deployment.folder)
    assert view is not None
    assert [entry.deadline for entry in view.entries] == [resumption.deadline]
