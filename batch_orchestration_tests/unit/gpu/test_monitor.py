"""The watch over a run's devices, on a made-up clock: heat, faults, and devices that go unseen."""

import msgspec
import pytest

from batch_orchestration.core.errors import GpuUnreadable
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.monitor import PAUSE_SECONDS, STOP_SECONDS, DeviceMonitor
from batch_orchestration.gpu.thermal import Throttle

FIRST = GpuFacts(
    index=0,
    uuid="GPU-1",
    name="Test",
    temperature_celsius=60,
    slowdown_celsius=92,
    ecc_uncorrectable_errors=0,
    remap_pending=False,
    remap_failed=False,
    recovery_action="none",
)
SECOND = msgspec.structs.replace(FIRST, index=1, uuid="GPU-2")


class Bench:
    """A watch, its devices and its clock; each `look` comes 5 s after the one before."""

    def __init__(self, *devices, used=None):
        self.now = 0.0
        self.devices = {device.uuid: device for device in devices}
        self.answer = None
        self.fences = []
        self.fences_are_durable = True
        self.watch = DeviceMonitor(
            lambda: self.answer or tuple(self.devices.values()),
            devices=len(devices) if used is None else used,
            max_celsius=None,
            fence_off=self._fence,
            clock=lambda: self.now,
        )

    def _fence(self, device, fault, lost):
        self.fences.append((device.uuid, fault, lost))
        return self.fences_are_durable

    def set(self, uuid, **facts):
        self.devices[uuid] = msgspec.structs.replace(self.devices[uuid], **facts)

    def look(self, times=1):
        for _ in range(times):
            self.now += 5
            self.seen = self.watch.look()
        return self.watch.throttle()


def test_devices_that_are_well_get_everything():
    bench = Bench(FIRST, SECOND)

    assert bench.look(100) == Throttle(share=1.0, stop=None)
    assert bench.seen == (FIRST, SECOND)


def test_heat_takes_work_away_pauses_it_and_gives_it_back():
    bench = Bench(FIRST, SECOND)
    bench.look()
    bench.set("GPU-2", temperature_celsius=90)
    fall = [bench.look().share for _ in range(8)]
    bench.set("GPU-2", temperature_celsius=70)
    climb = {bench.look().share for _ in range(30)}

    assert fall == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0, 0.0]
    assert climb == {0.0, 0.125, 0.25, 0.5, 1.0}
    assert bench.watch.throttle() == Throttle()
    assert bench.fences == []


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        ({"ecc_uncorrectable_errors": 2}, "2 uncorrectable memory errors (ECC) while it worked"),
        ({"remap_pending": True}, "waits to be remapped"),
        ({"remap_failed": True}, "could not be remapped"),
        ({"recovery_action": "gpu_reset"}, "the driver asks for gpu_reset"),
        ({"xids": (13, 79)}, "the driver reported Xid 79"),
    ],
    ids=repr,
)
def test_a_fault_stops_the_run_for_good_and_fences_its_device_alone(facts, fault):
    bench = Bench(FIRST, SECOND)
    bench.look()
    bench.set("GPU-2", **facts)
    throttle = bench.look()
    bench.set("GPU-2", **{name: getattr(FIRST, name) for name in facts})
    later = bench.look(100)

    ((uuid, told, lost),) = bench.fences
    assert (uuid, lost) == ("GPU-2", False)
    assert fault in told
    assert throttle == Throttle(share=0.0, stop=f"GPU 1 (Test) is fenced: {told}")
    assert later == throttle


def test_errors_of_memory_from_before_the_run_are_the_gates_business():
    bench = Bench(msgspec.structs.replace(FIRST, ecc_uncorrectable_errors=3))
    before = bench.look(2)
    bench.set("GPU-1", ecc_uncorrectable_errors=5)
    bench.look()

    assert before == Throttle()
    assert [fault for _, fault, _ in bench.fences] == [
        "2 uncorrectable memory errors (ECC) while it worked"
    ]


def test_an_error_of_the_program_says_nothing_against_the_device():
    bench = Bench(FIRST)
    bench.look()
    bench.set("GPU-1", xids=(13, 31, 43, 45, 68, 109, 154))

    assert bench.look() == Throttle()


def test_every_faulty_device_is_fenced_once_with_its_first_fault():
    bench = Bench(FIRST, SECOND)
    bench.look()
    bench.set("GPU-1", remap_pending=True, recovery_action="gpu_reset")
    bench.set("GPU-2", remap_failed=True)
    bench.look(3)

    assert [(uuid, fault[:20]) for uuid, fault, _ in bench.fences] == [
        ("GPU-1", "a broken row of memo"),
        ("GPU-2", "a broken row of memo"),
    ]


def test_a_fence_that_cannot_be_written_stops_the_run_all_the_same_and_is_tried_again():
    bench = Bench(FIRST)
    bench.look()
    bench.fences_are_durable = False
    bench.set("GPU-1", remap_pending=True)
    throttle = bench.look(2)
    bench.fences_are_durable = True
    bench.look(5)

    assert throttle.stop is not None
    assert len(bench.fences) == 4


@pytest.mark.parametrize("how", ["it is told to be lost", "it is not there any more"])
def test_a_device_that_fell_off_the_bus_is_a_fault(how):
    bench = Bench(FIRST, SECOND)
    bench.look()
    if how == "it is told to be lost":
        bench.answer = GpuUnreadable("GPU is lost", lost=1)
    else:
        del bench.devices["GPU-2"]
    throttle = bench.look()

    assert [(uuid, lost) for uuid, _, lost in bench.fences] == [("GPU-2", True)]
    assert "fallen off the bus" in throttle.stop


def test_an_instance_that_is_gone_is_not_taken_for_a_device_that_fell_off_the_bus():
    """Somebody cut the device anew: no fault, but nothing to work on either."""
    instance = msgspec.structs.replace(
        FIRST, uuid="MIG-1", device_uuid="GPU-1", mig_enabled=True, mig_instance=True
    )
    bench = Bench(instance)
    bench.look()
    bench.devices = {"GPU-1": FIRST}

    assert bench.look(30).stop.startswith("the devices could not be read for")
    assert bench.fences == []


def test_another_device_that_is_lost_is_not_fenced_by_us():
    bench = Bench(FIRST, SECOND, used=1)
    bench.look()
    bench.answer = GpuUnreadable("GPU is lost", lost=1)

    assert bench.look() == Throttle()
    assert bench.fences == []


@pytest.mark.parametrize(
    "break_it",
    [
        lambda bench: setattr(bench, "answer", GpuUnreadable("NVML says: no")),
        lambda bench: bench.set("GPU-1", temperature_celsius=2**32 - 1),
        lambda bench: bench.set("GPU-1", ecc_uncorrectable_errors=-1),
    ],
    ids=["unreadable", "nonsense", "more nonsense"],
)
def test_devices_that_go_unseen_are_paused_and_then_end_the_run(break_it):
    bench = Bench(FIRST)
    bench.look()
    break_it(bench)
    cares = [(bench.look(), bench.now) for _ in range(40)]

    unseen = {now - 5: throttle for throttle, now in cares}
    assert all(
        throttle == Throttle() for since, throttle in unseen.items() if since <= PAUSE_SECONDS
    )
    assert all(throttle.share == 0 for since, throttle in unseen.items() if since > PAUSE_SECONDS)
    assert {since for since, throttle in unseen.items() if throttle.stop} == {
        since for since in unseen if since > STOP_SECONDS
    }
    assert bench.fences == []


def test_devices_that_are_seen_again_in_time_go_on():
    bench = Bench(FIRST)
    bench.look()
    bench.answer = GpuUnreadable("NVML says: no")
    paused = bench.look(10)
    bench.answer = None

    assert paused == Throttle(share=0.0)
    assert bench.look() == Throttle()


def test_a_watch_that_nobody_keeps_pauses_by_itself_and_ends_nothing():
    """The thread that looks may be dead, or the whole process was stopped for an hour."""
    bench = Bench(FIRST)
    bench.look()
    bench.now += 3600

    assert bench.watch.throttle() == Throttle(share=0.0, stop=None)
    assert bench.look() == Throttle()


def test_too_few_devices_are_none():
    bench = Bench(FIRST, used=2)

    assert bench.look(4).share == 0.0
    assert "1 of 2 GPU(s) are there" in bench.look(40).stop


def test_a_watch_whose_thread_hangs_ends_the_run_of_whoever_asks_for_care():
    bench = Bench(FIRST)
    bench.look()
    cares = []
    for _ in range(300):
        bench.now += 0.5
        cares.append(bench.watch.throttle())

    assert cares[-1] == Throttle(share=0.0, stop="the devices have not been read for 136 s")
    assert bench.look().stop == cares[-1].stop


@pytest.mark.parametrize("nonsense", [2**63, -1])
def test_errors_count_from_the_first_look_that_makes_sense(nonsense):
    bench = Bench(FIRST)
    bench.set("GPU-1", ecc_uncorrectable_errors=nonsense)
    bench.look()
    bench.set("GPU-1", ecc_uncorrectable_errors=0)
    before = bench.look()
    bench.set("GPU-1", ecc_uncorrectable_errors=1)

    assert before == Throttle()
    assert "1 uncorrectable memory errors" in bench.look().stop


def test_a_count_of_errors_that_began_anew_is_where_new_ones_count_from():
    bench = Bench(msgspec.structs.replace(FIRST, ecc_uncorrectable_errors=7))
    bench.look()
    bench.set("GPU-1", ecc_uncorrectable_errors=0)
    bench.look()
    bench.set("GPU-1", ecc_uncorrectable_errors=1)

    assert "1 uncorrectable memory errors" in bench.look().stop
