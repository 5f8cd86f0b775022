"""The gate: every input, and what it says to it."""

import msgspec
import pytest

from batch_orchestration.core.errors import GpuUnreadable
from batch_orchestration.gpu.facts import GpuFacts, GpuProcess
from batch_orchestration.gpu.gate import GpuNeed, unhealthy_reasons

GIB = 2**30
HEALTHY = GpuFacts(
    index=0,
    uuid="GPU-1",
    name="Test",
    memory_total_bytes=80 * GIB,
    memory_used_bytes=1 * GIB,
    memory_free_bytes=79 * GIB,
    temperature_celsius=40,
    slowdown_celsius=92,
    utilization_percent=0,
    power_watts=60.0,
    sm_clock_mhz=1410,
    throttle_reasons=("gpu_idle",),
    ecc_uncorrectable_errors=0,
    remap_pending=False,
    remap_failed=False,
    recovery_action="none",
    processes=(),
    mig_enabled=False,
)
#: All that a device may leave out.
SILENT = GpuFacts(
    index=0,
    uuid="GPU-1",
    name="Test",
    memory_total_bytes=80 * GIB,
    memory_used_bytes=1 * GIB,
    memory_free_bytes=79 * GIB,
)


def reasons_against(*devices, need=GpuNeed(memory_bytes=20 * GIB), own=(), max_celsius=None):  # noqa: B008
    return unhealthy_reasons(devices, max_celsius=max_celsius, need=need, own=frozenset(own))


def with_facts(**facts):
    return msgspec.structs.replace(HEALTHY, **facts)


def process(**fields):
    return GpuProcess(**{"pid": 4242, "name": "python", "memory_bytes": 2 * GIB, **fields})


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"temperature_celsius": 87},
        {"temperature_celsius": -50, "slowdown_celsius": 150},
        {"temperature_celsius": 85, "slowdown_celsius": None},
        {"memory_free_bytes": 20 * GIB},
        {"utilization_percent": 100, "power_watts": 0.0, "sm_clock_mhz": 0},
        {"throttle_reasons": ("sw_power_cap", "hw_thermal_slowdown")},
        {"mig_enabled": True, "mig_instance": True},
        {"processes": (process(memory_bytes=64 * 2**20),)},
        {"processes": None},
    ],
    ids=repr,
)
def test_a_healthy_device_has_no_reason_against_it(facts):
    assert reasons_against(with_facts(**facts)) == []


def test_what_a_device_does_not_have_is_not_held_against_it():
    assert reasons_against(SILENT) == []


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"temperature_celsius": 88}, "88 °C, 87 °C allowed"),
        ({"temperature_celsius": 86, "slowdown_celsius": None}, "86 °C, 85 °C allowed"),
        ({"ecc_uncorrectable_errors": 1}, "1 uncorrectable memory errors"),
        ({"remap_failed": True}, "could not be remapped"),
        ({"remap_pending": True}, "waits to be remapped"),
        ({"recovery_action": "gpu_reset"}, "the driver asks for gpu_reset"),
        ({"recovery_action": "action_99"}, "the driver asks for action_99"),
        ({"mig_enabled": True}, "name one in CUDA_VISIBLE_DEVICES"),
        ({"processes": (process(),)}, "pid 4242 (python) holds 2.0 GiB, which is not ours"),
        ({"processes": (process(memory_bytes=None),)}, "an unknown amount of memory"),
        ({"processes": (process(name=None),)}, "pid 4242 (name unknown)"),
        ({"memory_free_bytes": 20 * GIB - 1}, "20.0 GiB of 80.0 GiB are free, 20.0 GiB needed"),
        ({"memory_free_bytes": None}, "does not report its memory"),
        ({"memory_total_bytes": None}, "does not report its memory"),
        ({"memory_total_bytes": 0}, "nonsense: memory_total_bytes is 0"),
        ({"memory_used_bytes": 81 * GIB}, "nonsense: memory_used_bytes is"),
        ({"memory_free_bytes": 81 * GIB}, "nonsense: memory_free_bytes is"),
        ({"memory_free_bytes": -1}, "nonsense: memory_free_bytes is -1"),
        ({"memory_used_bytes": -1}, "nonsense: memory_used_bytes is -1"),
        ({"memory_total_bytes": -1}, "nonsense: memory_total_bytes is -1"),
        ({"temperature_celsius": -51}, "nonsense: temperature_celsius is -51"),
        ({"temperature_celsius": 151}, "nonsense: temperature_celsius is 151"),
        ({"slowdown_celsius": 2**32 - 1}, "nonsense: slowdown_celsius is"),
        ({"utilization_percent": 101}, "nonsense: utilization_percent is 101"),
        ({"utilization_percent": -1}, "nonsense: utilization_percent is -1"),
        ({"power_watts": -0.5}, "nonsense: power_watts is -0.5"),
        ({"power_watts": float("nan")}, "nonsense: power_watts is nan"),
        ({"sm_clock_mhz": -1}, "nonsense: sm_clock_mhz is -1"),
        ({"ecc_uncorrectable_errors": -1}, "nonsense: ecc_uncorrectable_errors is -1"),
        ({"processes": (process(memory_bytes=-1),)}, "nonsense: process 4242 holds -1 bytes"),
        # What an error or an overflow looks like in NVML's unsigned numbers.
        ({"memory_total_bytes": 2**64 - 1}, "nonsense: memory_total_bytes is"),
        ({"memory_used_bytes": None, "memory_free_bytes": 2**64 - 1}, "memory_free_bytes is"),
        ({"temperature_celsius": 2**32 - 1}, "nonsense: temperature_celsius is"),
        ({"temperature_celsius": float("nan")}, "nonsense: temperature_celsius is nan"),
        ({"shutdown_celsius": 2**32 - 1}, "nonsense: shutdown_celsius is"),
        ({"power_watts": (2**32 - 1) / 1000}, "nonsense: power_watts is"),
        ({"power_watts": float("inf")}, "nonsense: power_watts is inf"),
        ({"power_limit_watts": (2**32 - 1) / 1000}, "nonsense: power_limit_watts is"),
        ({"sm_clock_mhz": 2**32 - 1}, "nonsense: sm_clock_mhz is"),
        ({"sm_clock_max_mhz": 2**32 - 1}, "nonsense: sm_clock_max_mhz is"),
        ({"memory_clock_mhz": -1}, "nonsense: memory_clock_mhz is -1"),
        ({"ecc_uncorrectable_errors": 2**64 - 1}, "nonsense: ecc_uncorrectable_errors is"),
    ],
    ids=repr,
)
def test_whatever_is_wrong_shuts_the_gate_and_is_named(facts, reason):
    reasons = reasons_against(with_facts(**facts))

    assert any(reason in found for found in reasons)
    assert all(found.startswith("GPU 0 (Test): ") for found in reasons)


#: Facts that are shown to people, and judged by nobody.
ONLY_SHOWN = {"index", "uuid", "name", "throttle_reasons", "mig_instance", "device_uuid", "xids"}


def test_every_fact_of_a_device_is_an_input_of_the_table_above():
    """A fact that is added is judged, or somebody has said that it is not."""
    marks = test_whatever_is_wrong_shuts_the_gate_and_is_named.pytestmark
    judged = {name for facts, _ in marks[0].args[1] for name in facts}

    assert judged == set(GpuFacts.__struct_fields__) - ONLY_SHOWN


def test_a_fenced_device_shuts_the_gate_and_says_how_to_clear_it():
    instance = with_facts(uuid="MIG-7", device_uuid="GPU-1", mig_enabled=True, mig_instance=True)

    for device in (HEALTHY, instance):
        (reason,) = unhealthy_reasons(
            [device], need=GpuNeed(), fences={"GPU-1": "fenced", "GPU-2": "no"}
        )
        assert reason == (
            "GPU 0 (Test): fenced; once it is well: python -m batch_orchestration gpu --clear GPU-1"
        )


def test_nothing_is_concluded_from_nonsense():
    device = with_facts(memory_used_bytes=-1, temperature_celsius=100, remap_pending=True)

    assert len(reasons_against(device)) == 1


@pytest.mark.parametrize("devices", [0, 1])
def test_a_missing_device_shuts_the_gate(devices):
    (reason,) = reasons_against(*[HEALTHY] * devices, need=GpuNeed(devices=2))

    assert reason.startswith("2 GPU(s) needed")


def test_what_cannot_be_read_shuts_the_gate():
    reasons = unhealthy_reasons(GpuUnreadable("NVML says: GPU is lost"), need=GpuNeed())

    assert reasons == ["NVML says: GPU is lost"]


def test_only_the_devices_that_the_engine_will_use_are_judged():
    sick = msgspec.structs.replace(HEALTHY, index=1, remap_failed=True)

    assert reasons_against(HEALTHY, sick) == []
    assert len(reasons_against(HEALTHY, sick, need=GpuNeed(devices=2))) == 1


@pytest.mark.parametrize(("limit", "healthy"), [(60.0, False), (61.0, True), (90.0, True)])
def test_a_limit_that_is_set_is_the_one_that_counts(limit, healthy):
    device = with_facts(temperature_celsius=61, slowdown_celsius=62)

    assert (reasons_against(device, max_celsius=limit) == []) is healthy


def test_our_own_engine_is_no_stranger_but_what_it_holds_is_not_free():
    device = with_facts(memory_free_bytes=GIB, processes=(process(memory_bytes=70 * GIB),))

    assert reasons_against(device, own=[4242], need=GpuNeed()) == []
    assert len(reasons_against(device, own=[4242])) == 1
    assert len(reasons_against(device, own=[1])) == 2


def test_memory_is_not_judged_where_nobody_knows_what_is_needed():
    assert reasons_against(with_facts(memory_free_bytes=0), need=GpuNeed()) == []
