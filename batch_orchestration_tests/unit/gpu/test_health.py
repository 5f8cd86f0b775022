"""GPU health: the gate around a driver that may be missing, wrong, or silent."""

import json
import os
import subprocess
import threading
import time

import pytest

from batch_orchestration.core.errors import GpuUnhealthy, GpuUnreadable
from batch_orchestration.engines.processes.records import ProcessRecord, identify, write_record
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu import health as gpu_health
from batch_orchestration.gpu import monitor as device_watch_module
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.health import (
    GpuReader,
    check_gpu,
    device_monitor,
    engine_need,
    gpu_problem,
    needed_bytes,
    no_gate,
    own_pids,
    require_healthy_gpu,
)
from batch_orchestration.gpu.nvml import read_gpus
from batch_orchestration.operations.health.report import Level
from batch_orchestration.settings import Settings
from batch_orchestration_tests.support.fake_nvml import GIB, GPU_IS_LOST, FakeGpu
from batch_orchestration_tests.support.health_bench import HealthBench

GPU = GpuFacts(index=0, uuid="GPU-1", name="Test")


@pytest.fixture
def make_settings(tmp_path):
    def make(**values):
        values = {"engine": "vllm", "device": "cuda", "data_dir": tmp_path, **values}
        return Settings(**values, _env_file=None)

    return make


# --- a driver that does not answer ----------------------------------------------------------------


class SilentDriver:
    """Hangs until it is told to answer."""

    def __init__(self):
        self.answer = threading.Event()
        self.asked = 0

    def read(self):
        self.asked += 1
        self.answer.wait()
        return (GPU,)


def test_a_driver_that_hangs_is_left_after_the_time_limit_and_asked_by_one_thread_only():
    driver = SilentDriver()
    reader = GpuReader(driver.read)
    began = time.monotonic()

    answers = [reader.readings(seconds=0.05) for _ in range(3)]

    assert time.monotonic() - began < 60
    assert all(isinstance(answer, GpuUnreadable) for answer in answers)
    assert "has not answered for" in str(answers[-1])
    assert driver.asked == 1
    driver.answer.set()
    assert reader.readings(seconds=5) == (GPU,)
    assert reader.readings(seconds=5) == (GPU,)
    assert driver.asked == 2


def test_an_error_that_nobody_foresaw_is_unreadable_too():
    def read():
        raise TypeError("an integer is required")

    answer = GpuReader(read).readings(seconds=5)

    assert isinstance(answer, GpuUnreadable)
    assert "an integer is required" in str(answer)


# --- the problem ----------------------------------------------------------------------------------


def test_a_healthy_gpu_is_no_problem(install, make_settings):
    install(FakeGpu())

    assert gpu_problem(make_settings()) is None
    require_healthy_gpu(make_settings())


def test_all_that_is_wrong_is_told_in_one_line(install, make_settings):
    install(FakeGpu(temperature=99, remapped=(0, 0, 1, 0)))

    problem = gpu_problem(make_settings())

    assert "99 °C, 87 °C allowed; GPU 0 (NVIDIA Test): a broken row" in problem
    assert "\n" not in problem


def test_the_temperature_that_is_set_counts(install, make_settings):
    install(FakeGpu(temperature=60))

    assert "60 °C, 55 °C allowed" in gpu_problem(make_settings(gpu_max_temperature=55))


@pytest.mark.parametrize(
    "values",
    [
        {"device": "cpu"},
        {"engine": "simulated"},
        {"engine": "remote", "base_url": "http://127.0.0.1:9"},
    ],
)
def test_without_a_gpu_in_the_settings_nobody_looks(install, make_settings, values):
    install(FakeGpu(temperature=GPU_IS_LOST))
    settings = make_settings(**values)

    assert gpu_problem(settings) is None
    assert no_gate(settings).startswith("no GPU gate applies: BATCH_")
    assert check_gpu(settings).healthy


def test_an_error_of_nvml_never_makes_a_cpu_of_a_gpu(make_settings, install):
    install(init=GPU_IS_LOST)

    assert no_gate(make_settings()) is None
    assert gpu_problem(make_settings()) == "NVML says: GPU is lost"


def test_a_gpu_that_recovers_in_time_is_waited_for(install, make_settings, monkeypatch):
    monkeypatch.setattr(gpu_health, "_LOOK_SECONDS", 0.05)
    device = FakeGpu(processes={4711: 30 * GIB})
    install(device)
    threading.Timer(0.2, device.processes.clear).start()

    require_healthy_gpu(make_settings())


def test_a_gpu_that_does_not_recover_is_refused(install, make_settings, monkeypatch):
    monkeypatch.setattr(gpu_health, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(gpu_health, "PATIENCE_SECONDS", 0.05)
    install(FakeGpu(processes={4711: 30 * GIB}))

    with pytest.raises(GpuUnhealthy, match="pid 4711"):
        require_healthy_gpu(make_settings())


# --- the watch over a run -------------------------------------------------------------------------


def test_a_run_on_cuda_is_watched_and_what_cannot_be_read_gets_no_work(make_settings, monkeypatch):
    """With the real library, where there is no GPU."""
    readings = GpuReader(read_gpus).readings(seconds=5)
    if not isinstance(readings, GpuUnreadable):
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(device_watch_module, "PAUSE_SECONDS", -1.0)
    monkeypatch.setattr(device_watch_module, "STOP_SECONDS", -1.0)
    watch = device_monitor(make_settings(), run_id="run-1")

    assert watch.look() == ()
    assert watch.throttle().share == 0.0
    assert str(readings) in watch.throttle().stop


@pytest.mark.parametrize("values", [{"device": "cpu"}, {"engine": "simulated"}])
def test_only_the_settings_say_that_a_run_is_not_watched(install, make_settings, values):
    install(init=GPU_IS_LOST)

    assert device_monitor(make_settings(**values), run_id="run-1") is None
    assert device_monitor(make_settings(), run_id="run-1") is not None


def test_the_watch_goes_by_the_devices_that_the_engine_uses(install, make_settings):
    install(FakeGpu(uuid="GPU-1"), FakeGpu(uuid="GPU-2", temperature=99), FakeGpu(uuid="GPU-3"))
    two = make_settings(engine_args={"tensor_parallel_size": 2})

    one_watch, two_watch = (
        device_monitor(make_settings(), run_id="r"),
        device_monitor(two, run_id="r"),
    )

    assert [gpu.uuid for gpu in one_watch.look()] == ["GPU-1"]
    assert [gpu.uuid for gpu in two_watch.look()] == ["GPU-1", "GPU-2"]
    assert (one_watch.throttle().share, two_watch.throttle().share) == (1.0, 0.5)


# --- our own engine -------------------------------------------------------------------------------


def record_engine(folder, process):
    """What a run writes down when it starts an engine."""
    record = ProcessRecord(
        leader=identify(process.pid), owner=identify(os.getpid()), members=(), command=("engine",)
    )
    write_record(folder.logs / "engines" / "run-1.process.json", record)


def test_a_running_engine_of_ours_is_no_stranger_and_its_memory_is_not_missed(
    install, make_settings, tmp_path
):
    """The next run of another batch is asked for while this one runs."""
    engine = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        record_engine(DataFolder(tmp_path), engine)
        memory = FakeGpu().memory
        memory.free, memory.used = 2 * GIB, 78 * GIB
        install(FakeGpu(memory=memory, processes={engine.pid: 72 * GIB}))

        assert own_pids(DataFolder(tmp_path)) == {engine.pid}
        assert gpu_problem(make_settings()) is None
    finally:
        engine.kill()
        engine.wait()
    assert own_pids(DataFolder(tmp_path)) == frozenset()
    assert f"pid {engine.pid}" in gpu_problem(make_settings())


@pytest.mark.parametrize(
    ("trouble", "engine_is_ours", "level"),
    [
        ({"temperature": 60}, True, Level.HEALTHY),
        ({"temperature": 89}, True, Level.DEGRADED),
        ({"temperature": 89}, False, Level.UNHEALTHY),
        ({"temperature": 89, "ecc": 3}, True, Level.UNHEALTHY),
        ({"ecc": 3}, True, Level.UNHEALTHY),
    ],
)
def test_heat_under_an_engine_of_ours_is_cared_for_and_wakes_nobody(
    install, tmp_path, trouble, engine_is_ours, level
):
    bench = HealthBench(tmp_path, engine="vllm", device="cuda", model="org/model")
    engine = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        if engine_is_ours:
            record_engine(bench.folder, engine)
        install(FakeGpu(**trouble))

        assert bench.find("gpu").level is level
    finally:
        engine.kill()
        engine.wait()


# --- what the engine needs ------------------------------------------------------------------------


def make_model(path, *, size, config=None, name="model.safetensors"):
    path.mkdir(exist_ok=True)
    with (path / name).open("wb") as file:
        file.truncate(size)
    (path / "config.json").write_text(json.dumps(config or {"torch_dtype": "bfloat16"}))
    return path


def test_a_model_that_does_not_fit_is_told_with_the_numbers(install, make_settings, tmp_path):
    install(FakeGpu())
    model = make_model(tmp_path / "big", size=100 * GIB)

    problem = gpu_problem(make_settings(model=str(model)))

    assert "79.0 GiB of 80.0 GiB are free, 106.0 GiB needed: 100.0 GiB of weights" in problem


def test_spread_over_devices_it_fits(install, make_settings, tmp_path):
    install(FakeGpu(), FakeGpu(uuid="GPU-2"))
    model = make_model(tmp_path / "big", size=100 * GIB)
    settings = make_settings(model=str(model), engine_args={"tensor_parallel_size": 2})

    assert gpu_problem(settings) is None
    assert engine_need(settings).devices == 2


@pytest.mark.parametrize(
    ("model", "args", "why"),
    [
        ("org/on-a-hub", {}, "name of a model on a hub"),
        ("", {}, "no model to serve"),
        ("{folder}", {"quantization": "fp8"}, "change the weights (quantization)"),
        ("{folder}/empty", {}, "there are no weights"),
    ],
)
def test_an_unknown_need_says_why(make_settings, tmp_path, model, args, why):
    make_model(tmp_path / "m", size=1)
    (tmp_path / "m" / "empty").mkdir()
    need = engine_need(make_settings(model=model.format(folder=tmp_path / "m"), engine_args=args))

    assert need.memory_bytes is None
    assert why in need.why


@pytest.mark.parametrize(("devices", "share"), [(1, 1.0), (4, 0.25)])
def test_weights_margin_and_the_smallest_cache_are_needed(devices, share):
    weights, per_token = 16 * 10**9, 128 * 1024

    needed = needed_bytes(weights, kv_bytes_per_token=per_token, devices=devices)

    assert needed == weights * share * 1.05 + GIB + 2048 * per_token
