"""Reading GPUs: against NVML's functions as they are told here, and against the real library."""

import sys

import pynvml  # noqa: TID253 - only its errors
import pytest

from batch_orchestration.core.errors import GpuUnreadable
from batch_orchestration.gpu.facts import GpuProcess
from batch_orchestration.gpu.health import GpuReader
from batch_orchestration.gpu.nvml import read_gpus
from batch_orchestration_tests.support.fake_nvml import (
    GIB,
    GPU_IS_LOST,
    NO_LIBRARY,
    NOT_SUPPORTED,
    UNKNOWN,
    FakeGpu,
)


def three():
    return [FakeGpu(uuid=f"GPU-{n}{n}{n}") for n in range(3)]


def test_every_fact_arrives_in_its_unit(install):
    nvml = install(FakeGpu(processes={77: 2 * GIB, 78: None}, event_reasons=0x4 | 0x40 | 0x1000))
    nvml.names[77] = "/usr/bin/python3"

    (gpu,) = read_gpus()

    assert (gpu.index, gpu.uuid, gpu.name) == (0, "GPU-11111111-aaaa", "NVIDIA Test")
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes) == (80 * GIB, GIB)
    assert gpu.memory_free_bytes == 79 * GIB
    assert (gpu.temperature_celsius, gpu.slowdown_celsius, gpu.shutdown_celsius) == (40, 92, 97)
    assert (gpu.utilization_percent, gpu.power_watts, gpu.sm_clock_mhz) == (3, 61.5, 1410)
    assert (gpu.power_limit_watts, gpu.sm_clock_max_mhz, gpu.memory_clock_mhz) == (400, 1980, 1215)
    assert gpu.throttle_reasons == ("sw_power_cap", "hw_thermal_slowdown", "unknown_0x1000")
    assert (gpu.ecc_uncorrectable_errors, gpu.recovery_action) == (0, "none")
    assert (gpu.remap_pending, gpu.remap_failed) == (False, False)
    assert (gpu.mig_enabled, gpu.mig_instance) == (False, False)
    assert gpu.processes == (
        GpuProcess(pid=77, name="/usr/bin/python3", memory_bytes=2 * GIB),
        GpuProcess(pid=78),
    )
    assert nvml.open == 0


def test_what_a_device_does_not_report_is_none(install):
    facts = ("temperature", "slowdown", "utilization", "power_milliwatts", "sm_clock", "ecc")
    more = ("shutdown", "power_limit_milliwatts", "sm_clock_max", "memory_clock")
    others = (
        *more,
        "memory",
        "event_reasons",
        "throttle_reasons",
        "remapped",
        "processes",
        "mig",
        "margin",
    )
    install(FakeGpu(**dict.fromkeys((*facts, *others, "recovery"), NOT_SUPPORTED)))

    (gpu,) = read_gpus()

    told = {name: getattr(gpu, name) for name in gpu.__struct_fields__}
    known = {"index": 0, "uuid": gpu.uuid, "name": "NVIDIA Test", "mig_instance": False, "xids": ()}
    assert {name: value for name, value in told.items() if value is not None} == known


def test_a_device_that_tells_degrees_left_instead_of_a_threshold_slows_down_there(install):
    install(FakeGpu(slowdown=NOT_SUPPORTED, temperature=70, margin=17))

    assert read_gpus()[0].slowdown_celsius == 87


@pytest.mark.parametrize(
    "code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT]
)
def test_a_driver_without_the_recovery_action_does_not_report_it(install, code):
    install(FakeGpu(recovery_return=code))

    assert read_gpus()[0].recovery_action is None


def test_an_older_driver_calls_the_throttle_reasons_by_another_name(install):
    install(FakeGpu(event_reasons=NOT_SUPPORTED, throttle_reasons=0x8))

    assert read_gpus()[0].throttle_reasons == ("hw_slowdown",)


def test_faults_are_told_in_words(install):
    install(FakeGpu(ecc=2, remapped=(0, 1, 1, 1), recovery=4), FakeGpu(uuid="GPU-2", recovery=77))

    first, second = read_gpus()

    assert (first.ecc_uncorrectable_errors, first.recovery_action) == (2, "drain_and_reset")
    assert (first.remap_pending, first.remap_failed) == (True, True)
    assert second.recovery_action == "action_77"


@pytest.mark.parametrize("name", ["memory", "temperature", "ecc", "processes", "recovery", "mig"])
@pytest.mark.parametrize("error", [GPU_IS_LOST, UNKNOWN], ids=str)
def test_any_other_error_is_raised_and_closes_the_library(install, name, error):
    nvml = install(FakeGpu(), FakeGpu(uuid="GPU-2", **{name: error}))

    with pytest.raises(GpuUnreadable, match=f"GPU 1 .*{error}"):
        read_gpus()
    assert nvml.open == 0


@pytest.mark.parametrize(
    "fields",
    [{"handle": GPU_IS_LOST}, {"uuid_error": GPU_IS_LOST}, {"temperature": GPU_IS_LOST}],
)
@pytest.mark.parametrize(
    ("visible", "place"), [(None, 1), ("1", 0), ("2,1", 1), ("GPU-11", 0), ("GPU-00,GPU-11", 1)]
)
def test_a_device_that_is_lost_is_told_by_its_place(install, monkeypatch, visible, place, fields):
    install(FakeGpu(uuid="GPU-000"), FakeGpu(uuid="GPU-111", **fields), FakeGpu(uuid="GPU-222"))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    with pytest.raises(GpuUnreadable, match=f"GPU {place} of those visible.*lost") as raised:
        read_gpus()

    assert raised.value.lost == place


def test_another_device_that_is_lost_is_not_taken_for_ours(install, monkeypatch):
    install(FakeGpu(uuid="GPU-000", handle=GPU_IS_LOST), FakeGpu(uuid="GPU-111"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-111")

    assert [gpu.uuid for gpu in read_gpus()] == ["GPU-111"]


def test_other_errors_do_not_say_that_a_device_is_lost(install):
    install(FakeGpu(temperature=UNKNOWN))

    with pytest.raises(GpuUnreadable) as raised:
        read_gpus()

    assert raised.value.lost is None


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": "hot"},
        {"ecc": 1.5},
        {"sm_clock": [1410]},
        {"power_milliwatts": object()},
        {"utilization": True},
        {"memory": (1, 2, 3)},
        {"remapped": ()},
        {"processes": {"me": 1}},
        {"event_reasons": "none"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_is_no_number_where_one_is_due_is_unreadable(install, fields):
    """By whichever exception: `GpuReader` makes the same of all of them."""
    install(FakeGpu(**fields))

    answer = GpuReader(read_gpus).readings(seconds=5)

    assert isinstance(answer, GpuUnreadable)


def test_a_library_that_cannot_be_opened_is_the_same_exception(install):
    install(init=NO_LIBRARY)

    with pytest.raises(GpuUnreadable, match="Shared Library Not Found"):
        read_gpus()


def test_a_missing_package_is_the_same_exception(install, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)

    with pytest.raises(GpuUnreadable, match="not installed"):
        read_gpus()


# --- which devices --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["GPU-000", "GPU-111", "GPU-222"]),
        ("", []),
        ("-1", []),
        ("2,0", ["GPU-222", "GPU-000"]),
        (" 1 , 2 ", ["GPU-111", "GPU-222"]),
        ("GPU-222", ["GPU-222"]),
        ("GPU-1,0", ["GPU-111", "GPU-000"]),
        ("0,7,1", ["GPU-000"]),
        ("0,nonsense,1", ["GPU-000"]),
        ("GPU-", []),
        ("1,1", []),
        ("MIG-unknown", []),
    ],
)
def test_the_devices_are_those_that_cuda_shows_in_its_order(install, monkeypatch, visible, uuids):
    install(*three())
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert [gpu.uuid for gpu in read_gpus()] == uuids


def test_an_instance_has_its_own_memory_and_the_heat_of_its_device(install, monkeypatch):
    whole = FakeGpu(mig=(1, 1), temperature=71)
    part = FakeGpu(uuid="MIG-5", name="Test MIG 1g", temperature=NOT_SUPPORTED, parent=whole)
    part.memory.total = 10 * GIB
    whole.instances["MIG-5"] = part
    install(whole)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-5")

    (gpu,) = read_gpus()

    assert (gpu.uuid, gpu.memory_total_bytes) == ("MIG-5", 10 * GIB)
    assert (gpu.temperature_celsius, gpu.mig_enabled, gpu.mig_instance) == (71, True, True)
    assert (gpu.device_uuid, gpu.hardware_uuid) == (whole.uuid, whole.uuid)


# --- the real library -----------------------------------------------------------------------------


def test_the_real_library_on_a_machine_without_a_gpu_is_unreadable():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        with pytest.raises(GpuUnreadable, match=f"NVML says: {error}"):
            read_gpus()
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has a GPU")


@pytest.mark.gpu
def test_the_real_library_reports_a_real_device():
    try:
        gpus = read_gpus()
    except GpuUnreadable as error:
        pytest.skip(str(error))

    assert gpus
    assert all(gpu.memory_total_bytes for gpu in gpus)
