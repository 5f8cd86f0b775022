import random
import time
from pathlib import Path

from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import NOW, make_input, make_plan
from batch_orchestration_tests.support.children import child, lines_until_killed, next_line

CHUNKS = 5
PER_CHUNK = 200

COMMIT_FOR_EVER = """
    import itertools, sys
    from pathlib import Path
    from batch_orchestration.core.results import SettledRequest
    from batch_orchestration.store.store import Store
    from batch_orchestration_tests.support.builders import *

    path, first_round = Path(sys.argv[1]), int(sys.argv[2])
    plan = make_plan(make_input(1000), requests_per_chunk=200)
    store = Store(path)
    for attempt in itertools.count(first_round):
        chunk = plan.chunks[attempt % len(plan.chunks)]
        # Each commit is recognised by its number of attempts, and fails other requests.
        requests = [
            make_settled(i, make_failure() if i % 7 == attempt % 7 else None, attempts=attempt)
            for i in range(chunk.first_index, chunk.first_index + chunk.requests)
        ]
        store.commit_chunk(plan.batch_id, chunk.number, requests, run_id="r", at=NOW, seconds=1)
        print(attempt, flush=True)
"""


def test_a_commit_is_all_or_nothing_and_an_acknowledged_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "batch.duckdb"
    plan = make_plan(make_input(CHUNKS * PER_CHUNK), requests_per_chunk=PER_CHUNK)
    store = Store(path)
    store.add_batch(plan, at=NOW)
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    acknowledged: dict[int, int] = {}
    attempt = 1

    for _ in range(8):
        with child(COMMIT_FOR_EVER, path, attempt) as process:
            lines = [next_line(process)]
            time.sleep(chance.uniform(0, 0.3))
            lines += lines_until_killed(process)
        for attempt in map(int, lines):
            acknowledged[attempt % CHUNKS] = attempt
        assert_consistent(store, plan.batch_id, acknowledged)
        attempt += 2


def assert_consistent(store: Store, batch_id: str, acknowledged: dict[int, int]) -> None:
    _, rows = store.query(
        "SELECT chunk, attempts, count(*), count(DISTINCT request_index) FROM"
        " (SELECT chunk, attempts, request_index FROM results"
        "  UNION ALL SELECT chunk, attempts, request_index FROM failed_requests"
        "  WHERE state <> 'resolved')"
        " GROUP BY chunk, attempts"
    )
    reports = store.chunk_reports(batch_id)
    assert sorted(chunk for chunk, *_ in rows) == sorted(reports)
    for chunk, attempts, count, distinct in rows:
        assert count == distinct == PER_CHUNK
        # A commit may be durable without having been acknowledged, never the other way round.
        assert attempts >= acknowledged.get(chunk, 0)
        assert reports[chunk].attempts == attempts * PER_CHUNK
    assert acknowledged.keys() <= reports.keys()
    record = store.batch(batch_id)
    assert record.completed + record.failed == PER_CHUNK * len(reports)
    assert record.chunks_committed == len(reports)


def test_a_store_whose_maker_is_killed_can_be_made_again(tmp_path: Path) -> None:
    make = """
        import sys
        from pathlib import Path
        from batch_orchestration.store.store import Store
        print("ready", flush=True)
        Store(Path(sys.argv[1])).migrate()
    """
    for number in range(4):
        path = tmp_path / str(number) / "batch.duckdb"
        with child(make, path) as process:
            next_line(process)
            time.sleep(0.004 * number)
            lines_until_killed(process)

        assert Store(path).batches() == []
