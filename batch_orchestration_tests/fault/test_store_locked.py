import logging
import threading
import time
from pathlib import Path

import pytest

from batch_orchestration.core.errors import StoreLocked
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import (
    NOW,
    make_input,
    make_plan,
    make_settled_chunk,
)
from batch_orchestration_tests.support.children import child, next_line

#: A person with the DuckDB command line, who may have a look for so long.
STRANGER = """
    import sys, time
    import duckdb
    path, mode, seconds = sys.argv[1:]
    connection = duckdb.connect(path, read_only=mode == "read-only")
    connection.execute("FROM batches").fetchall()
    print("inside", flush=True)
    time.sleep(float(seconds))
"""

COMMIT = """
    import sys
    from pathlib import Path
    from batch_orchestration.store.store import Store
    from batch_orchestration_tests.support.builders import *
    path, numbers = Path(sys.argv[1]), sys.argv[2].split(",")
    plan = make_plan(make_input(40), requests_per_chunk=2)
    print("ready", flush=True)
    input()
    for number in map(int, numbers):
        requests = make_settled_chunk(plan.chunks[number])
        Store(path).commit_chunk(plan.batch_id, number, requests, run_id="r", at=NOW, seconds=1)
    print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("mode", "seconds"), [("read-write", 2), ("read-only", 2), ("read-write", 13)]
)
def test_a_stranger_inside_only_delays_a_commit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, seconds: float
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "batch.duckdb"
    store = Store(path)
    plan = make_plan(make_input(10))
    store.add_batch(plan, at=NOW)

    with child(STRANGER, path, mode, seconds) as stranger:
        assert next_line(stranger) == "inside"
        started = time.monotonic()
        requests = make_settled_chunk(plan.chunks[0])
        store.commit_chunk(plan.batch_id, 0, requests, run_id="r", at=NOW, seconds=1)

    assert time.monotonic() - started > seconds - 1
    assert store.batch(plan.batch_id).completed == 10
    waits = [record.getMessage() for record in caplog.records if "has waited" in record.msg]
    assert len(waits) == 1 + (seconds - 1) // 10
    assert all("to write" in wait and f"held by pid {stranger.pid}" in wait for wait in waits)
    assert "duckdb" in waits[0].split("held by")[1]


def test_a_reader_of_ours_waits_for_a_writing_stranger(tmp_path: Path) -> None:
    path = tmp_path / "batch.duckdb"
    store = Store(path)
    store.migrate()

    with child(STRANGER, path, "read-write", 2) as stranger:
        next_line(stranger)
        assert store.batches() == []


def test_who_waits_past_the_deadline_is_told_who_was_inside(tmp_path: Path) -> None:
    path = tmp_path / "batch.duckdb"
    Store(path).migrate()

    with child(STRANGER, path, "read-only", 60) as stranger:
        next_line(stranger)
        with pytest.raises(
            StoreLocked, match=rf"to write .*batch.duckdb: held by pid {stranger.pid}"
        ):
            Store(path, deadline_seconds=1).check_writable()
        assert Store(path, deadline_seconds=1).batches() == []


def test_a_thread_that_waits_for_a_stranger_does_not_keep_readers_out(tmp_path: Path) -> None:
    path = tmp_path / "batch.duckdb"
    store = Store(path)
    store.migrate()

    with child(STRANGER, path, "read-only", 4) as stranger:
        next_line(stranger)
        writer = threading.Thread(target=store.check_writable)
        writer.start()
        time.sleep(0.5)
        started = time.monotonic()
        store.batches()
        waited = time.monotonic() - started
        assert writer.is_alive()
        writer.join()

    assert waited < 2


def test_many_processes_that_commit_at_once_all_get_through(tmp_path: Path) -> None:
    path = tmp_path / "batch.duckdb"
    store = Store(path)
    plan = make_plan(make_input(40), requests_per_chunk=2)
    store.add_batch(plan, at=NOW)

    with (
        child(COMMIT, path, "0,1,2,3,4") as first,
        child(COMMIT, path, "5,6,7,8,9") as second,
        child(COMMIT, path, "10,11,12,13,14") as third,
    ):
        for process in (first, second, third):
            assert next_line(process) == "ready"
        for process in (first, second, third):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for number in range(15, 20):
            requests = make_settled_chunk(plan.chunks[number])
            store.commit_chunk(plan.batch_id, number, requests, run_id="r", at=NOW, seconds=1)
        for process in (first, second, third):
            assert next_line(process) == "done"

    assert store.batch(plan.batch_id).completed == 40
