"""The status of a batch in the store, and its history."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import IllegalTransition
from batch_orchestration.core.lifecycle import TRANSITIONS
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import NOW, make_input, make_plan


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "batch.duckdb", deadline_seconds=60)


def admitted(store: Store) -> str:
    plan = make_plan(make_input(3))
    store.add_batch(plan, at=NOW + 1)
    return plan.batch_id


def test_admission_is_the_beginning_of_a_batchs_history(store: Store) -> None:
    batch_id = admitted(store)

    first, second = store.batch_events(batch_id)

    assert (first.from_status, first.to_status, first.at) == (None, "validating", NOW)
    assert (second.from_status, second.to_status, second.at) == (
        *("validating", "in_progress"),
        NOW + 1,
    )
    assert {first.actor, second.actor} == {"admission"}
    assert second.reason == "3 requests, 0 of them faulty"


def test_a_status_keeps_the_time_at_which_it_was_reached_and_who_brought_it(store: Store) -> None:
    batch_id = admitted(store)

    for second, status in ((5.25, "finalizing"), (9, "finalizing"), (10, "completed")):
        store.set_status(
            batch_id, BatchStatus(status), at=NOW + second, actor=f"run-{second}", reason="ü\ud800"
        )

    record = store.batch(batch_id)
    assert record.status is BatchStatus.COMPLETED
    assert record.times == {
        "validating": NOW,
        "in_progress": NOW + 1,
        "finalizing": NOW + 5.25,
        "completed": NOW + 10,
    }
    events = store.batch_events(batch_id)[2:]
    assert [(e.to_status, e.at, e.actor) for e in events] == [
        ("finalizing", NOW + 5.25, "run-5.25"),
        ("completed", NOW + 10, "run-10"),
    ]


def test_a_resumed_batch_has_not_ended_but_its_history_knows_that_it_had(store: Store) -> None:
    batch_id = admitted(store)

    for second, word in enumerate(("cancelling", "cancelled", "in_progress"), start=2):
        store.set_status(batch_id, BatchStatus(word), at=NOW + second, actor="me", reason="")

    assert store.batch(batch_id).times == {"validating": NOW, "in_progress": NOW + 4}
    assert [str(event.to_status) for event in store.batch_events(batch_id)] == [
        *("validating", "in_progress", "cancelling", "cancelled", "in_progress")
    ]


# Hypothesis takes no fixtures with a lifetime of one example.
@given(wanted=st.lists(st.sampled_from(BatchStatus), min_size=1, max_size=8))
@settings(max_examples=6, deadline=None)
def test_whatever_is_wanted_status_times_and_events_agree(wanted: list[BatchStatus]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "batch.duckdb")
        batch_id = admitted(store)
        for second, status in enumerate(wanted, start=2):
            before = store.batch(batch_id), store.batch_events(batch_id)
            legal = status in TRANSITIONS[before[0].status]
            try:
                store.set_status(batch_id, status, at=NOW + second, actor="me", reason="why")
            except IllegalTransition:
                assert not legal
            if not legal:
                assert (store.batch(batch_id), store.batch_events(batch_id)) == before
            else:
                assert len(store.batch_events(batch_id)) == len(before[1]) + 1

        record, events = store.batch(batch_id), store.batch_events(batch_id)
        assert record.status is events[-1].to_status
        assert record.times[record.status] == events[-1].at
        assert [e.from_status for e in events[1:]] == [e.to_status for e in events[:-1]]
        latest = {str(event.to_status): event.at for event in events}
        assert record.times.items() <= latest.items()
