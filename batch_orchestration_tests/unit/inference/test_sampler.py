"""The sampler: a file that grows beside a run, and stops nothing."""

import threading
import time

import pytest

from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.gate import GpuLimits
from batch_orchestration.gpu.monitor import DeviceMonitor
from batch_orchestration.gpu.samples import read_samples
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.sampler import RunSampler
from batch_orchestration.workers.vitals import RunVitals

GPU = GpuFacts(index=0, uuid="GPU-1", name="Test", temperature_celsius=60)
HOT = GpuFacts(index=0, uuid="GPU-1", name="Test", temperature_celsius=99)


@pytest.fixture
def folder(tmp_path):
    return DataFolder(tmp_path)


@pytest.fixture
def vitals():
    vitals = RunVitals(patience_seconds=60)
    vitals.begin_batch("b-1")
    return vitals


def watch(read):
    return DeviceMonitor(read, devices=1, limits=GpuLimits(), fence_off=lambda *_: True)


def sampler(vitals, folder, **fields):
    return RunSampler(vitals, folder=folder, run_id="run-1", **{"seconds": 60, **fields})


def test_a_run_without_devices_is_sampled_from_its_start_to_its_end(folder, vitals):
    with sampler(vitals, folder) as sampling:
        vitals.in_flight, vitals.window = 3, 8
        vitals.requests_per_second = 1.5
        vitals.engine = EngineMetrics(running=3, kv_usage=0.25)
        throttle = sampling.throttle()

    last = read_samples(folder, "b-1")[-1]
    assert 1 <= len(read_samples(folder, "b-1")) <= 2
    assert (last.run_id, last.in_flight, last.window) == ("run-1", 3, 8)
    assert last.requests_per_second == 1.5
    assert last.engine == EngineMetrics(running=3, kv_usage=0.25)
    assert last.gpus == ()
    assert throttle == Throttle()


def test_devices_go_into_the_samples_and_the_vitals(folder, vitals):
    with sampler(vitals, folder, watch=watch(lambda: (GPU,))):
        pass

    assert vitals.gpus == (GPU,)
    assert read_samples(folder, "b-1")[-1].gpus == (GPU,)


def test_before_there_is_a_batch_devices_are_watched_and_nothing_is_written(folder, vitals):
    vitals.own_batch_id = None
    with sampler(vitals, folder, watch=watch(lambda: (HOT,))) as sampling:
        pass

    assert sampling.throttle().share == 0.5
    assert not folder.batches.exists()


def test_what_cannot_be_written_is_said_once_and_stops_nothing(folder, vitals, caplog):
    folder.batches.write_text("not a folder")
    with sampler(vitals, folder, seconds=0.001, watch=watch(lambda: (GPU,))):
        time.sleep(0.05)

    assert len([r for r in caplog.records if "sample of the run is missing" in r.message]) == 1
    assert vitals.gpus == (GPU,)


def test_a_driver_that_hangs_does_not_keep_the_run_from_ending(folder, vitals, monkeypatch):
    monkeypatch.setattr("batch_orchestration.inference.sampler.STOP_SECONDS", 0.05)
    release = threading.Event()

    def read():
        release.wait()
        return (GPU,)

    began = time.monotonic()
    with sampler(vitals, folder, watch=watch(read)):
        pass
    release.set()

    assert time.monotonic() - began < 60


def test_samples_stay_with_the_runs_own_batch_while_it_serves_a_guest(folder, vitals):
    vitals.begin_chunk("guest", 0)
    with sampler(vitals, folder):
        pass

    assert read_samples(folder, "b-1")[-1].batch_id == "b-1"
    assert read_samples(folder, "guest") == []
