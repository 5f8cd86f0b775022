import json
from pathlib import Path

import msgspec
import pytest

from batch_orchestration.core.batches import BatchOptions, BatchPlan, BatchStatus
from batch_orchestration.core.errors import BatchNotFound, OutcomeMismatch, StorageError
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode
from batch_orchestration.core.results import SettledRequest
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import (
    NOW,
    make_attempt,
    make_completion,
    make_failure,
    make_input,
    make_plan,
    make_settled,
    make_settled_chunk,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data" / "batch.duckdb", deadline_seconds=60)


def admitted(store: Store, requests: int = 25, per_chunk: int = 10, **fields: object) -> BatchPlan:
    plan = make_plan(make_input(requests), requests_per_chunk=per_chunk, **fields)
    store.add_batch(plan, at=NOW + 1)
    return plan


def commit(store: Store, plan: BatchPlan, number: int, requests: list[SettledRequest]) -> None:
    store.commit_chunk(plan.batch_id, number, requests, run_id="run-1", at=NOW, seconds=2.5)


def contents(store: Store) -> list[list[tuple]]:
    """All rows that matter of all tables."""
    return [
        sorted(store.query(f"SELECT * FROM {table}")[1], key=repr)
        for table in ("batches", "chunks", "results", "failed_requests")
    ]


def test_a_new_batch_is_in_progress_with_every_chunk_pending(store: Store) -> None:
    plan = admitted(store, options=BatchOptions(priority=5, metadata={"project": "ü"}))

    record = store.batch(plan.batch_id)

    assert (record.total, record.completed, record.failed, record.pending) == (25, 0, 0, 25)
    assert (record.chunks, record.chunks_committed) == (3, 0)
    assert (record.status, record.model) == (BatchStatus.IN_PROGRESS, plan.settings["model"])
    assert record.times == {"validating": NOW, "in_progress": NOW + 1}
    assert (record.options, record.settings_hash) == (plan.options, plan.settings_hash)
    assert store.chunk_reports(plan.batch_id) == {}


def test_adding_a_batch_twice_is_adding_it_once(store: Store) -> None:
    plan = admitted(store)
    commit(store, plan, 0, make_settled_chunk(plan.chunks[0]))
    before = contents(store)

    store.add_batch(plan, at=NOW + 100)

    assert contents(store) == before


def test_two_batches_never_share_an_id(store: Store) -> None:
    plan = admitted(store)

    with pytest.raises(StorageError, match="another batch has the id"):
        store.add_batch(msgspec.structs.replace(plan, identity="f" * 64), at=NOW)


def test_a_batch_is_found_by_what_it_is(store: Store) -> None:
    plan = admitted(store)

    assert store.find_identity(plan.identity) == store.batch(plan.batch_id)
    assert store.find_identity("f" * 64) is None


def test_batches_are_listed_newest_first(store: Store) -> None:
    plans = [make_plan(make_input(number), file_name=f"{number}.jsonl") for number in (1, 2, 3)]
    for plan, created_at in zip(plans, (NOW, NOW + 2, NOW + 1), strict=True):
        store.add_batch(msgspec.structs.replace(plan, created_at=created_at), at=NOW)

    assert [record.file_name for record in store.batches()] == ["2.jsonl", "3.jsonl", "1.jsonl"]


def test_what_is_not_there_is_not_found(store: Store) -> None:
    with pytest.raises(BatchNotFound):
        store.batch("none")
    with pytest.raises(BatchNotFound):
        store.set_status("none", BatchStatus.COMPLETED, at=NOW, actor="run-1", reason="")
    with pytest.raises(BatchNotFound):
        store.commit_chunk("none", 0, [make_settled()], run_id="r", at=NOW, seconds=0)
    assert store.batches() == []
    assert list(store.settled("none")) == []


def test_a_commit_reports_the_figures_of_its_chunk(store: Store) -> None:
    plan = admitted(store)
    requests = make_settled_chunk(plan.chunks[1], failing=(11, 13))
    requests[0] = make_settled(10, attempts=4)
    requests[5] = make_settled(15, make_failure(FailureCode.INVALID_JSON), attempts=0)

    report = store.commit_chunk(plan.batch_id, 1, requests, run_id="run-9", at=NOW, seconds=2.5)

    assert (report.number, report.requests, report.completed, report.failed) == (1, 10, 7, 3)
    assert (report.prompt_tokens, report.completion_tokens) == (7 * 7, 7 * 3)
    assert (report.attempts, report.seconds, report.run_id) == (12, 2.5, "run-9")
    assert report.failures_by_code == {"engine_refused": 2, "invalid_json": 1}
    assert store.chunk_reports(plan.batch_id) == {1: report}
    assert store.failure_counts(plan.batch_id) == report.failures_by_code


def test_counts_of_the_batch_add_up_after_each_commit(store: Store) -> None:
    plan = admitted(store)

    for done, chunk in enumerate(reversed(plan.chunks), start=1):
        commit(store, plan, chunk.number, make_settled_chunk(chunk, failing=(0, 12, 22)))
        record = store.batch(plan.batch_id)
        assert record.chunks_committed == done
        assert record.completed + record.failed + record.pending == record.total == 25

    assert (record.completed, record.failed) == (22, 3)
    assert (record.prompt_tokens, record.completion_tokens) == (22 * 7, 22 * 3)


def test_committing_twice_is_committing_once(store: Store) -> None:
    plan = admitted(store)
    requests = make_settled_chunk(plan.chunks[0], failing=(3,))
    commit(store, plan, 0, requests)
    before = contents(store)

    commit(store, plan, 0, requests)

    assert contents(store) == before


def test_a_later_commit_replaces_an_earlier_one(store: Store) -> None:
    plan = admitted(store)
    commit(store, plan, 0, make_settled_chunk(plan.chunks[0], failing=tuple(range(10))))

    commit(store, plan, 0, make_settled_chunk(plan.chunks[0]))

    record = store.batch(plan.batch_id)
    assert (record.completed, record.failed, record.chunks_committed) == (10, 0, 1)
    assert store.failures(plan.batch_id) == []


def test_outcomes_that_are_not_one_to_one_are_refused_whole(store: Store) -> None:
    plan = admitted(store)
    good = make_settled_chunk(plan.chunks[0])
    before = contents(store)

    for wrong in (
        good[:-1],
        [*good, good[0]],
        [*good[:-1], good[0]],
        [*good[:-1], make_settled(10)],
    ):
        with pytest.raises(OutcomeMismatch):
            commit(store, plan, 0, wrong)

    assert contents(store) == before


def test_settled_requests_come_back_as_they_were_in_index_order(store: Store) -> None:
    plan = admitted(store)
    requests = [
        *make_settled_chunk(plan.chunks[0], failing=(2, 7)),
        *make_settled_chunk(plan.chunks[2]),
    ]
    requests[4] = make_settled(
        4, make_completion(request_id=None, finish_reason=None), failed_attempts=(make_attempt(),)
    )
    requests[7] = make_settled(
        7,
        make_failure(FailureCode.TIMEOUT, status=None, body=None, request_id=None),
        attempts=3,
        failed_attempts=(make_attempt(), make_attempt(FailureCode.ENGINE_ERROR, at=NOW + 0.5)),
    )
    commit(store, plan, 2, requests[10:])
    commit(store, plan, 0, requests[9::-1])

    found = list(store.settled(plan.batch_id))

    # The bodies of answered requests are in the kept input, and not kept twice.
    bodiless = [
        msgspec.structs.replace(request, body=b"")
        if isinstance(request.outcome, Completion)
        else request
        for request in requests
    ]
    assert found == bodiless
    assert store.failures(plan.batch_id) == [bodiless[2], bodiless[7]]
    assert store.failures(plan.batch_id, limit=1) == [bodiless[2]]


def test_texts_of_every_kind_survive(store: Store) -> None:
    answer = {"text": "ü 漢字 \U0001f600 \x00 \x1e \" ' \\ ; DROP TABLE results", "n": 1.0}
    body = json.dumps(answer, ensure_ascii=False, indent=1).encode()
    plan = admitted(store, requests=3)
    requests = [
        make_settled(0, make_completion(body=msgspec.Raw(body)), custom_id="ü\x00'\U0001f600"),
        make_settled(1, make_failure(body=msgspec.Raw(body)), body=body, custom_id=""),
        make_settled(2, make_completion("x" * 2**20)),
    ]
    commit(store, plan, 0, requests)

    first, second, large = store.settled(plan.batch_id)

    assert first.custom_id == "ü\x00'\U0001f600"
    assert isinstance(first.outcome, Completion)
    assert bytes(first.outcome.body) == body
    assert isinstance(second.outcome, Failure)
    assert (bytes(second.outcome.body or b""), second.body) == (body, body)
    assert large.outcome == requests[2].outcome


def test_unreadable_lines_are_kept_as_far_as_text_can(store: Store) -> None:
    failure = make_failure(
        FailureCode.INVALID_JSON, status=None, body=None, message="line 1: \udcff"
    )
    plan = admitted(store, requests=1)
    line = make_settled(
        0, failure, custom_id=None, endpoint="", body=b'{"a": \xff\x00\n', attempts=0
    )
    commit(store, plan, 0, [line])

    (found,) = store.failures(plan.batch_id)

    assert (found.custom_id, found.endpoint, found.attempts) == (None, "", 0)
    assert found.body == '{"a": �\x00\n'.encode()
    assert isinstance(found.outcome, Failure)
    assert found.outcome.message.startswith("line 1: ")


def test_a_rare_value_deep_in_a_column_of_nothing_is_kept(store: Store) -> None:
    """DuckDB guesses the type of a column by a sample of its values."""
    plan = admitted(store, requests=3000, per_chunk=3000)
    requests = [
        make_settled(index, make_completion(request_id=None, finish_reason=None), custom_id=None)
        for index in range(3000)
    ]
    requests[1717] = make_settled(1717, make_completion(request_id="rare"), custom_id="rare")
    commit(store, plan, 0, requests)

    found = [request for request in store.settled(plan.batch_id) if request.custom_id]

    assert found == [msgspec.structs.replace(requests[1717], body=b"")]
