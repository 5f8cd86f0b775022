"""Assembly: output and error files from the store, all or nothing."""

import contextlib
import errno
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import duckdb
import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import (
    AccountingError,
    BatchNotFound,
    OutboxUnwritable,
    StorageError,
)
from batch_orchestration.delivery import outbox
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import (
    NOW,
    make_batch,
    make_settled,
    make_settled_chunk,
)

REPOSITORY = Path(__file__).resolve().parents[3]
FILES = ("output.jsonl", "errors.jsonl", "report.md", "report.html")


@pytest.fixture
def folder(tmp_path):
    return DataFolder(tmp_path / "data")


@pytest.fixture
def store(folder):
    return Store(folder.duckdb, deadline_seconds=5)


def settle_batch(folder, store, *, requests=25, failing=(), chunks=None):
    """A batch of which the chunks (default: all) are committed."""
    plan = make_batch(folder, requests, requests_per_chunk=10)
    store.add_batch(plan, at=NOW)
    for chunk in plan.chunks if chunks is None else plan.chunks[:chunks]:
        settled = make_settled_chunk(chunk, failing=failing)
        store.commit_chunk(
            plan.batch_id, chunk.number, settled, run_id="r", at=NOW + 60, seconds=5.0
        )
    return plan


def assembled(plan, folder, store, clock=lambda: NOW + 100):
    return assemble(plan.batch_id, folder=folder, store=store, clock=clock)


def read_outbox(plan, folder):
    return {
        path.name: path.read_bytes() for path in sorted(folder.outbox_path(plan.batch_id).iterdir())
    }


def read_ids(content):
    return [json.loads(line)["custom_id"] for line in content.splitlines()]


class FakeStore(Store):
    """A store whose settled requests come from the test."""

    def __init__(self, path, settled):
        super().__init__(path)
        self._settled = settled

    def settled(self, batch_id):
        yield from self._settled


def test_each_request_is_in_exactly_one_file_in_input_order(folder, store):
    plan = settle_batch(folder, store, failing=(0, 12, 24))

    report = assembled(plan, folder, store)

    files = read_outbox(plan, folder)
    assert sorted(files) == sorted(FILES)
    errors = [0, 12, 24]
    assert read_ids(files["errors.jsonl"]) == [f"request-{i}" for i in errors]
    answered = [i for i in range(25) if i not in errors]
    assert read_ids(files["output.jsonl"]) == [f"request-{i}" for i in answered]
    assert bytes(make_settled(1).outcome.body) in files["output.jsonl"].splitlines()[0]
    assert (report.totals.completed, report.totals.failed) == (22, 3)
    assert report.text.encode() == files["report.md"]


def test_a_batch_without_failures_has_an_empty_error_file(folder, store):
    plan = settle_batch(folder, store)

    assembled(plan, folder, store)

    assert read_outbox(plan, folder)["errors.jsonl"] == b""


def test_assembling_again_writes_the_same_bytes_and_keeps_the_times(folder, store):
    plan = settle_batch(folder, store, failing=(3,))
    moments = iter([NOW + 100, NOW + 101])
    assembled(plan, folder, store, clock=lambda: next(moments))
    first, record = read_outbox(plan, folder), store.batch(plan.batch_id)

    assembled(plan, folder, store, clock=lambda: NOW + 9999)

    assert read_outbox(plan, folder) == first
    assert store.batch(plan.batch_id) == record
    assert record.status is BatchStatus.COMPLETED
    assert (record.times["finalizing"], record.times["completed"]) == (NOW + 100, NOW + 101)


def test_an_unknown_batch_is_not_found(folder, store):
    folder.create()

    with pytest.raises(BatchNotFound):
        assemble("nothing-00000000", folder=folder, store=store, clock=lambda: NOW)


def test_a_batch_with_pending_chunks_is_not_assembled(folder, store):
    plan = settle_batch(folder, store, chunks=2)

    with pytest.raises(AccountingError, match=r"1 of 3 chunks \(5 requests\) have no outcome"):
        assembled(plan, folder, store)

    assert store.batch(plan.batch_id).status is BatchStatus.IN_PROGRESS
    assert not folder.outbox_path(plan.batch_id).exists()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([*range(7), *range(8, 25)], "request 7 has no outcome"),
        ([*range(8), *range(7, 25)], "request 7 comes twice"),
        ([*range(24)], "25 requests, the store has outcomes of 24"),
        ([*range(26)], "25 requests, the store has outcomes of 26"),
        ([1, 0, *range(2, 25)], "request 0 has no outcome"),
        ([], "25 requests, the store has outcomes of 0"),
    ],
)
def test_a_broken_sum_rule_raises_and_changes_no_file(folder, store, indices, message):
    plan = settle_batch(folder, store)
    liar = FakeStore(folder.duckdb, [make_settled(index) for index in indices])

    with pytest.raises(AccountingError, match=message):
        assembled(plan, folder, liar)

    assert read_outbox(plan, folder) == {}
    assert store.batch(plan.batch_id).status is BatchStatus.FINALIZING
    assembled(plan, folder, store)
    before = read_outbox(plan, folder)
    with pytest.raises(AccountingError, match=message):
        assembled(plan, folder, liar)
    assert read_outbox(plan, folder) == before


def test_an_outbox_that_cannot_be_written_is_named_with_the_next_step(folder, store):
    """A file in the folder's place, because root may write to read-only folders."""
    plan = settle_batch(folder, store)
    in_the_way = folder.outbox_path(plan.batch_id)
    in_the_way.write_text("I am a file")

    with pytest.raises(OutboxUnwritable) as caught:
        assembled(plan, folder, store)

    assert str(in_the_way) in str(caught.value)
    assert f"materialize batch_output for {plan.batch_id} again" in str(caught.value)
    assert store.batch(plan.batch_id).status is BatchStatus.IN_PROGRESS
    in_the_way.unlink()
    assembled(plan, folder, store)
    assert store.batch(plan.batch_id).status is BatchStatus.COMPLETED


def test_a_disk_that_fills_up_shows_no_file_and_the_rerun_works(folder, store, monkeypatch):
    plan = settle_batch(folder, store, failing=(20,))

    def no_room(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(outbox, "flush", no_room)
        with pytest.raises((OutboxUnwritable, StorageError), match="No space left"):
            assembled(plan, folder, store)

    assert read_outbox(plan, folder) == {}
    assert store.batch(plan.batch_id).status is BatchStatus.FINALIZING
    assembled(plan, folder, store)
    assert sorted(read_outbox(plan, folder)) == sorted(FILES)


def test_a_file_size_limit_is_a_full_disk_too(folder, store):
    """A real limit of the operating system, in a process of its own."""
    plan = settle_batch(folder, store)
    script = """
        import resource, sys
        from batch_orchestration.delivery import assembly
        from batch_orchestration.files.data_folder import DataFolder
        from batch_orchestration.store.store import Store

        class ReadOnce(Store):
            def set_status(self, *args, **kwargs):
                super().set_status(*args, **kwargs)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

        folder = DataFolder(sys.argv[1])
        assembly.assemble(sys.argv[2], folder=folder, store=ReadOnce(folder.duckdb), clock=float)
        """
    ended = run_script(script, folder, plan)

    assert ended.returncode == 1
    assert "OutboxUnwritable: cannot write to" in ended.stderr
    assert read_outbox(plan, folder) == {}
    assembled(plan, folder, store)
    assert len(read_ids(read_outbox(plan, folder)["output.jsonl"])) == 25


def test_an_assembly_killed_in_the_middle_is_repeated_from_the_start(folder, store, tmp_path):
    plan = settle_batch(folder, store, failing=(2, 17))
    script = """
        import os, signal, sys
        from batch_orchestration.delivery import assembly
        from batch_orchestration.files.data_folder import DataFolder
        from batch_orchestration.store.store import Store

        class Killed(Store):
            def settled(self, batch_id):
                for request in super().settled(batch_id):
                    if request.index == 15:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield request

        folder = DataFolder(sys.argv[1])
        assembly.assemble(sys.argv[2], folder=folder, store=Killed(folder.duckdb), clock=float)
        """
    ended = run_script(script, folder, plan)
    assert ended.returncode == -signal.SIGKILL
    assert not set(read_outbox(plan, folder)) & set(FILES)

    assembled(plan, folder, store)

    undisturbed_folder = DataFolder(tmp_path / "undisturbed")
    undisturbed_store = Store(undisturbed_folder.duckdb)
    same_plan = settle_batch(undisturbed_folder, undisturbed_store, failing=(2, 17))
    assembled(same_plan, undisturbed_folder, undisturbed_store)
    disturbed, undisturbed = read_outbox(plan, folder), read_outbox(same_plan, undisturbed_folder)
    assert sorted(disturbed) == sorted(FILES)
    for name in ("output.jsonl", "errors.jsonl"):
        assert disturbed[name] == undisturbed[name]


def test_an_assembly_killed_between_the_two_renames_is_completed_by_the_next(folder, store):
    plan = settle_batch(folder, store, failing=(2,))
    assembled(plan, folder, store)
    whole = read_outbox(plan, folder)
    (folder.outbox_path(plan.batch_id) / "output.jsonl").unlink()
    (folder.outbox_path(plan.batch_id) / "report.md").unlink()
    with contextlib.closing(duckdb.connect(folder.duckdb)) as killed:
        killed.execute("UPDATE batches SET status = 'finalizing', completed_at = NULL")

    assembled(plan, folder, store)

    assert read_outbox(plan, folder) == whole
    assert store.batch(plan.batch_id).status is BatchStatus.COMPLETED


def run_script(script, folder, plan):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), folder.root, plan.batch_id],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
