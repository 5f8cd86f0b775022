"""Samples: appended by runs, read for plots, taken into the store once, and pruned by age."""

import tracemalloc
from pathlib import Path

import duckdb
import pytest

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.gpu import sample_table as gpu_samples
from batch_orchestration.gpu.facts import GpuFacts, GpuProcess
from batch_orchestration.gpu.sample_table import GpuSampleTable, SampleTaker, prune_samples
from batch_orchestration.gpu.samples import (
    RunSample,
    append_sample,
    read_samples,
    sample_files,
    samples_folder,
)
from batch_orchestration.store import connection
from batch_orchestration.store.store import Store
from batch_orchestration_tests.support.builders import NOW
from batch_orchestration_tests.support.workbench import Workbench

DEVICE = GpuFacts(
    index=1,
    uuid="GPU-1",
    name="Test",
    memory_used_bytes=2**33,
    temperature_celsius=71,
    power_watts=312.5,
    throttle_reasons=("sw_power_cap", "hw_slowdown"),
    remap_pending=False,
    recovery_action="none",
    processes=(GpuProcess(pid=7),),
)
SILENT = GpuFacts(index=0, uuid="GPU-0", name="Silent")


@pytest.fixture
def bench(tmp_path):
    return Workbench(tmp_path / "data", lock_seconds=5.0)


@pytest.fixture
def batch_id(bench):
    return bench.admitted(20).batch_id


def sampled(bench, batch_id, *moments, run_id="run-1", gpus=(SILENT, DEVICE)):
    for at in moments:
        sample = RunSample(at=NOW + at, run_id=run_id, in_flight=8, window=16, gpus=gpus)
        append_sample(bench.folder, batch_id, sample)


def taker(bench, *, clock=lambda: 0.0, deadline_seconds=5.0):
    store = Store(bench.folder.duckdb, deadline_seconds=deadline_seconds)
    return SampleTaker(folder=bench.folder, store=store, clock=clock)


def table(bench, columns="run_id, epoch(sampled_at), gpu"):
    return bench.store.query(f"SELECT {columns} FROM gpu_samples ORDER BY sampled_at, run_id, gpu")[
        1
    ]


def test_samples_of_all_runs_come_back_in_the_order_of_time(bench, batch_id):
    sampled(bench, batch_id, 5, 15)
    sampled(bench, batch_id, 10, run_id="run-2", gpus=())

    samples = read_samples(bench.folder, batch_id)

    assert [(s.run_id, s.at - NOW) for s in samples] == [("run-1", 5), ("run-2", 10), ("run-1", 15)]
    assert samples[0].gpus == (SILENT, DEVICE)
    assert read_samples(bench.folder, "another") == []


def test_torn_and_damaged_lines_are_left_out(bench, batch_id):
    sampled(bench, batch_id, 5)
    path = samples_folder(bench.folder, batch_id) / "run-1.jsonl"
    whole = path.read_bytes()
    impossible = b'{"at": -1e18, "run_id": "run-1"}\n{"at": 1e18, "run_id": "run-1"}\n'
    bad = b'\0\0\xff\n{"at": "never"}\n' + impossible
    path.write_bytes(bad + whole + bad + whole[:-20])

    assert [s.at - NOW for s in read_samples(bench.folder, batch_id)] == [5]


def test_of_very_many_samples_few_are_held_and_those_that_tell_of_a_run(bench, batch_id):
    """A week of eight devices is a million of their readings."""
    devices = tuple(GpuFacts(index=n, uuid=f"GPU-{n}", name="Test") for n in range(8))
    for run_id in ("run-1", "run-2"):
        sampled(bench, batch_id, 0, run_id=run_id, gpus=devices)
        path = samples_folder(bench.folder, batch_id) / f"{run_id}.jsonl"
        line = path.read_bytes().replace(b'"restarts":0', b'"restarts":%d')
        at = str(NOW).encode()
        path.write_bytes(
            b"".join(line.replace(at, b"%d" % n, 1) % (n >= 1_500) for n in range(3_000))
        )
    tracemalloc.start()
    try:
        samples = read_samples(bench.folder, batch_id, until=2_900, most=100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 2 * 2**20
    assert 50 <= len(samples) <= 110
    assert [sample.at for sample in samples] == sorted(sample.at for sample in samples)
    of_run = [sample for sample in samples if sample.run_id == "run-2"]
    assert (of_run[0].at, of_run[-1].at) == (0, 2_900)
    assert next(sample.at for sample in of_run if sample.restarts) == 1_500


def test_every_device_of_a_sample_is_a_row_with_what_it_reports(bench, batch_id):
    sampled(bench, batch_id, 5.25)

    taker(bench).take_in(batch_id)

    columns = "gpu, gpu_index, memory_used_bytes, temperature_celsius, power_watts, remap_pending"
    assert [at for _, at, _ in table(bench)] == [NOW + 5.25] * 2
    assert table(bench, columns) == [
        ("GPU-0", 0, None, None, None, None),
        ("GPU-1", 1, 2**33, 71, 312.5, False),
    ]
    more = (
        "batch_id, epoch(sampled_at), throttle_reasons, recovery_action, in_flight, window_requests"
    )
    assert table(bench, more) == [
        (batch_id, NOW + 5.25, None, None, 8, 16),
        (batch_id, NOW + 5.25, "sw_power_cap,hw_slowdown", "none", 8, 16),
    ]


def test_taking_in_again_adds_only_what_is_new(bench, batch_id):
    sampled(bench, batch_id, 5, 10)
    for _ in range(2):
        taker(bench).take_in(batch_id)
    sampled(bench, batch_id, 15)
    sampled(bench, batch_id, 10, run_id="run-2")
    taker(bench).take_in(batch_id)

    moments = [(run, at - NOW) for run, at, gpu in table(bench) if gpu == "GPU-1"]
    assert moments == [("run-1", 5), ("run-1", 10), ("run-2", 10), ("run-1", 15)]


def test_a_clock_that_was_set_back_costs_no_samples(bench, batch_id):
    sampled(bench, batch_id, 5, 10, 15)
    taker(bench).take_in(batch_id)
    sampled(bench, batch_id, 2, 7, 12, 17)
    taker(bench).take_in(batch_id)

    moments = [at - NOW for _, at, gpu in table(bench) if gpu == "GPU-1"]
    assert moments == [2, 5, 7, 10, 12, 15, 17]


@pytest.mark.parametrize(
    "forget", ["DELETE FROM gpu_sample_files", "UPDATE gpu_sample_files SET bytes = 9999999"]
)
def test_rows_are_not_doubled_when_the_table_no_longer_knows_how_far_it_read(
    bench, batch_id, forget
):
    sampled(bench, batch_id, 5, 10)
    taker(bench).take_in(batch_id)
    with duckdb.connect(bench.folder.duckdb) as db:
        db.execute(forget)

    taker(bench).take_in(batch_id)

    assert len(table(bench)) == 4


def test_a_line_that_is_being_written_is_taken_in_once_it_is_whole(bench, batch_id):
    sampled(bench, batch_id, 5, 10)
    path = samples_folder(bench.folder, batch_id) / "run-1.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    taker(bench).take_in(batch_id)
    first = len(table(bench))
    path.write_bytes(whole)
    taker(bench).take_in(batch_id)

    assert (first, len(table(bench))) == (2, 4)


def test_a_long_file_is_taken_in_bit_by_bit_to_its_end(bench, batch_id, monkeypatch):
    sampled(bench, batch_id, *range(4))
    monkeypatch.setattr(gpu_samples, "MOST_BYTES", 2500)
    more = GpuSampleTable(bench.store).take_in(batch_id, sample_files(bench.folder, batch_id))
    first = len(table(bench))
    taker(bench).take_in(batch_id)

    assert more
    assert 0 < first < 8
    assert len(table(bench)) == 8


def test_what_has_no_device_leaves_no_row(bench, batch_id):
    sampled(bench, batch_id, 5, gpus=())
    taker(bench).take_in(batch_id)

    assert table(bench) == []


def test_a_new_store_has_them_again(bench, batch_id):
    """As after `recover`: how far a file was read is forgotten together with its rows."""
    sampled(bench, batch_id, 5)
    taker(bench).take_in(batch_id)
    bench.folder.duckdb.unlink()

    taker(bench).take_in(batch_id)

    assert len(table(bench)) == 2


def test_beside_commits_it_looks_once_a_minute(bench, batch_id):
    now = [0.0]
    beside = taker(bench, clock=lambda: now[0])
    counts = []
    for now[0] in (0.0, 30.0, 61.0):
        sampled(bench, batch_id, now[0])
        beside.after_commit(batch_id)
        counts.append(len(table(bench)))

    assert counts == [2, 2, 6]


def test_a_locked_store_is_left_alone_and_said_once(bench, batch_id, caplog):
    sampled(bench, batch_id, 5)
    beside = taker(bench, deadline_seconds=0.05)

    with connection.replacing(bench.folder.duckdb):
        beside.take_in(batch_id)
        beside.take_in(batch_id)

    said = [record for record in caplog.records if "not in the store yet" in record.message]
    assert len(said) == 1
    beside.take_in(batch_id)
    assert len(table(bench)) == 2


def test_damage_stops_nothing(bench, batch_id, caplog):
    huge = GpuFacts(index=0, uuid="GPU-0", name="Test", memory_used_bytes=2**70)
    sampled(bench, batch_id, 5, gpus=(huge,))

    taker(bench).take_in(batch_id)

    assert "not in the store yet" in caplog.text


def test_old_samples_of_batches_that_have_ended_are_pruned_and_no_others(bench, batch_id):
    ended = bench.admitted(7).batch_id
    for status in (BatchStatus.FINALIZING, BatchStatus.COMPLETED):
        bench.store.set_status(ended, status, at=NOW, actor="me", reason="")
    for each in (batch_id, ended):
        sampled(bench, each, 0, 100, run_id=f"run-{each}")
        taker(bench).take_in(each)
    # Both files were written just now, which is long after the moments in them.
    count = {"folder": bench.folder, "store": bench.store, "keep_seconds": 50.0}

    dry = prune_samples(now=NOW + 100.0, dry_run=True, **count)
    untouched = len(table(bench))
    pruned = prune_samples(now=NOW + 100.0, **count)
    left = [(at - NOW, batch) for batch, at in table(bench, "batch_id, epoch(sampled_at)")]
    later = prune_samples(now=4e9, **count)

    assert (dry.rows, dry.files, untouched) == (2, 0, 8)
    assert pruned == dry
    assert sorted(left) == sorted([(0, batch_id)] * 2 + [(100, batch_id)] * 2 + [(100, ended)] * 2)
    assert (later.rows, later.files) == (2, 1)
    assert later.file_bytes > 100
    assert read_samples(bench.folder, ended) == []
    assert len(read_samples(bench.folder, batch_id)) == 2
    assert {batch for (batch,) in table(bench, "batch_id")} == {batch_id}


def test_samples_lie_beside_the_plan(bench, batch_id):
    sampled(bench, batch_id, 1)

    assert Path(bench.folder.plan_path(batch_id).parent / "samples/run-1.jsonl").exists()
