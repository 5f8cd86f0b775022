"""The sampler: a file that grows beside a run, and stops nothing."""

import threading
import time

import pytest

from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.monitor import DeviceMonitor
from batch_orchestration.gpu.samples import read_samples
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.sampler import RunSampler
from batch_orchestration.workers.run_status import RunStatus

GPU = GpuFacts(index=0, uuid="GPU-1", name="Test", temperature_celsius=60)
HOT = GpuFacts(index=0, uuid="GPU-1", name="Test", temperature_celsius=99)


@pytest.fixture
def folder(tmp_path):
    return DataFolder(tmp_path)


@pytest.fixture
def status():
    status = RunStatus(patience_seconds=60)
    status.begin_batch("b-1")
    return status


def watch(read):
    return DeviceMonitor(read, devices=1, max_celsius=None, fence_off=lambda *_: True)


def sampler(status, folder, **fields):
    return RunSampler(status, folder=folder, run_id="run-1", **{"seconds": 60, **fields})


def test_a_run_without_devices_is_sampled_from_its_start_to_its_end(folder, status):
    with sampler(status, folder) as sampling:
        status.in_flight, status.window = 3, 8
        status.requests_per_second = 1.5
        status.engine = EngineMetrics(running=3, kv_usage=0.25)
        throttle = sampling.throttle()

    last = read_samples(folder, "b-1")[-1]
    assert 1 <= len(read_samples(folder, "b-1")) <= 2
    assert (last.run_id, last.in_flight, last.window) == ("run-1", 3, 8)
    assert last.requests_per_second == 1.5
    assert last.engine == EngineMetrics(running=3, kv_usage=0.25)
    assert last.gpus == ()
    assert throttle == Throttle()


def test_devices_go_into_the_samples_and_the_vitals(folder, status):
    with sampler(status, folder, watch=watch(lambda: (GPU,))):
        pass

    assert status.gpus == (GPU,)
    assert read_samples(folder, "b-1")[-1].gpus == (GPU,)


def test_before_there_is_a_batch_devices_are_watched_and_nothing_is_written(folder, status):
    status.primary_batch_id = None
    with sampler(status, folder, watch=watch(lambda: (HOT,))) as sampling:
        pass

    assert sampling.throttle().share == 0.5
    assert not folder.batches.exists()


def test_what_cannot_be_written_is_said_once_and_stops_nothing(folder, status, caplog):
    folder.batches.write_text("not a folder")
    with sampler(status, folder, seconds=0.001, watch=watch(lambda: (GPU,))):
        time.sleep(0.05)

    assert len([r for r in caplog.records if "sample of the run is missing" in r.message]) == 1
    assert status.gpus == (GPU,)


def test_a_driver_that_hangs_does_not_keep_the_run_from_ending(folder, status, monkeypatch):
    monkeypatch.setattr("batch_orchestration.inference.sampler.STOP_SECONDS", 0.05)
    release = threading.Event()

    def read():
        release.wait()
        return (GPU,)

    began = time.monotonic()
    with sampler(status, folder, watch=watch(read)):
        pass
    release.set()

    assert time.monotonic() - began < 60


def test_samples_stay_with_the_runs_own_batch_while_it_serves_a_guest(folder, status):
    status.begin_chunk("guest", 0)
    with sampler(status, folder):
        pass

    assert read_samples(folder, "b-1")[-1].batch_id == "b-1"
    assert read_samples(folder, "guest") == []
