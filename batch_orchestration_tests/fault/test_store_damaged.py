import contextlib
from pathlib import Path

import pytest

from batch_orchestration.core.errors import StorageError
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import (
    NOW,
    make_input,
    make_plan,
    make_settled_chunk,
)
from batch_orchestration_tests.support.children import child, next_line


@pytest.mark.parametrize("damage", ["header", "blocks", "truncated"])
def test_a_damaged_file_is_a_plain_error_and_is_left_as_it_is(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "batch.duckdb"
    store = Store(path)
    plan = make_plan(make_input(500), requests_per_chunk=500)
    store.add_batch(plan, at=NOW)
    requests = make_settled_chunk(plan.chunks[0])
    store.commit_chunk(plan.batch_id, 0, requests, run_id="r", at=NOW, seconds=1)
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[:4096] = bytes(4096)
    elif damage == "blocks":
        for place in range(12_288, len(content), 500):
            content[place] ^= 0xFF
    else:
        del content[12_288:]
    path.write_bytes(content)

    with pytest.raises(StorageError, match=r"batch\.duckdb"):
        list(store.settled(plan.batch_id))
    with pytest.raises(StorageError, match=r"batch\.duckdb"):
        store.commit_chunk(plan.batch_id, 0, requests, run_id="r", at=NOW, seconds=1)
    assert path.read_bytes() == content


#: The limit on the size of files is a full disk for one process: the same short write, then errors.
FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from batch_orchestration.core.errors import DiskFull
    from batch_orchestration.store.store import Store
    from batch_orchestration_tests.support.builders import *
    path = Path(sys.argv[1])
    plan = make_plan(make_input(1000), requests_per_chunk=500)
    store = Store(path)
    store.add_batch(plan, at=NOW)

    def commit(number):
        requests = make_settled_chunk(plan.chunks[number])
        store.commit_chunk(plan.batch_id, number, requests, run_id="r", at=NOW, seconds=1)

    commit(0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        commit(1)
        print("committed", flush=True)
    except DiskFull as error:
        print("disk full", flush=True)
    input()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    commit(1)
    print("committed", flush=True)
"""


def test_a_full_disk_refuses_a_commit_whole_until_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "batch.duckdb"
    batch_id = make_plan(make_input(1000), requests_per_chunk=500).batch_id

    with child(FULL_DISK, path) as process:
        assert next_line(process) == "disk full"
        assert Store(path).batch(batch_id).completed == 500
        assert process.stdin is not None
        process.stdin.write("there is room\n")
        process.stdin.flush()
        assert next_line(process) == "committed"

    assert Store(path).batch(batch_id).completed == 1000
    with contextlib.closing(Store(path).settled(batch_id)) as settled:
        assert [request.index for request in settled] == list(range(1000))
