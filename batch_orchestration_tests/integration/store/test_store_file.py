"""The store's file: who may use it when, what people ask of it, and what may be wrong with it."""

import threading
from importlib import resources
from pathlib import Path

import duckdb
import pytest

from batch_orchestration.core.batches import BatchPlan, BatchStatus
from batch_orchestration.core.errors import StorageError, StoreOfOtherVersion
from batch_orchestration.core.results import SettledRequest
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.operations.recovery import find_problem
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import (
    NOW,
    make_input,
    make_plan,
    make_settled_chunk,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "data" / "batch.duckdb", deadline_seconds=60)


def admitted(store: Store, requests: int = 25, per_chunk: int = 10) -> BatchPlan:
    plan = make_plan(make_input(requests), requests_per_chunk=per_chunk)
    store.add_batch(plan, at=NOW + 1)
    return plan


def commit(store: Store, plan: BatchPlan, number: int, requests: list[SettledRequest]) -> None:
    store.commit_chunk(plan.batch_id, number, requests, run_id="run-1", at=NOW, seconds=2.5)


def test_the_file_is_free_between_the_chunks_of_a_reader(store: Store) -> None:
    plan = admitted(store, requests=4, per_chunk=2)
    for chunk in plan.chunks:
        commit(store, plan, chunk.number, make_settled_chunk(chunk))

    reader = store.settled(plan.batch_id)
    next(reader)
    store.set_status(plan.batch_id, BatchStatus.FINALIZING, at=NOW, actor="run-1", reason="")

    assert len(list(reader)) == 3


def test_threads_of_one_process_share_a_store(store: Store) -> None:
    """DuckDB itself refuses to open a file for reading and for writing in one process."""
    plan = admitted(store, requests=16, per_chunk=2)
    problems: list[Exception] = []

    def work(job) -> None:
        try:
            for chunk in plan.chunks:
                job(chunk)
        except Exception as error:  # noqa: BLE001
            problems.append(error)

    jobs = [
        lambda chunk: commit(store, plan, chunk.number, make_settled_chunk(chunk)),
        lambda chunk: store.batch(plan.batch_id),
        lambda chunk: list(store.settled(plan.batch_id)),
    ]
    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert problems == []
    assert store.batch(plan.batch_id).completed == 16


@pytest.mark.parametrize("before", ["nothing", "an empty file", "a store that is deleted"])
def test_a_missing_or_empty_file_becomes_a_store(store: Store, tmp_path: Path, before: str) -> None:
    path = tmp_path / "data" / "batch.duckdb"
    if before == "a store that is deleted":
        admitted(store)
        path.unlink()
    elif before == "an empty file":  # as a process leaves it that dies right after creating it
        path.parent.mkdir()
        path.touch()

    assert store.batches() == []
    store.check_writable()


def test_migrations_are_applied_once(store: Store, tmp_path: Path) -> None:
    store.migrate()
    Store(tmp_path / "data" / "batch.duckdb").migrate()

    folder = resources.files("batch_orchestration.store") / "migrations"
    there_are = sorted(file.name for file in folder.iterdir() if file.name.endswith(".sql"))
    assert [name for _, name in store.query("FROM schema_migrations")[1]] == there_are


@pytest.mark.parametrize(
    ("version", "reason"),
    [(999, "newer version"), (10, r"earlier version.*start with a new data folder")],
)
def test_a_file_of_another_version_is_left_alone_and_the_error_says_what_to_do(
    tmp_path: Path, version: int, reason: str
) -> None:
    path = tmp_path / "batch.duckdb"
    with duckdb.connect(path) as other:
        other.execute("CREATE TABLE schema_migrations (version INTEGER, name VARCHAR)")
        other.execute("INSERT INTO schema_migrations VALUES (?, 'other.sql')", [version])
    before = path.read_bytes()

    with pytest.raises(StoreOfOtherVersion, match=reason):
        Store(path).batches()
    with pytest.raises(StoreOfOtherVersion):  # it needs no recovery, which would set it aside
        find_problem(folder=DataFolder(tmp_path), store=Store(path))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database" * 1000, b"\0" * 20_000])
def test_a_file_that_is_no_database_is_a_plain_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "batch.duckdb"
    path.write_bytes(content)

    with pytest.raises(StorageError, match=r"batch\.duckdb"):
        Store(path).batches()
    assert path.read_bytes() == content


def test_a_store_in_a_place_that_cannot_be_written_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file in the way")

    with pytest.raises(StorageError, match="cannot write"):
        Store(tmp_path / "data" / "batch.duckdb").check_writable()
