"""The watch over the devices of a run: what it may ask of them now, and when it has to let go.

Fails closed: devices that were not seen well for a while get no work, and those that stay unseen
end the run.
"""

import logging
import time
from collections.abc import Callable, Sequence

from batch_orchestration.core.errors import GpuUnreadable
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.faults import new_faults, recounted
from batch_orchestration.gpu.gate import GpuLimits, nonsense
from batch_orchestration.gpu.thermal import (
    ThermalPolicy,
    ThermalState,
    Throttle,
    heat_of,
    next_state,
    unknown_heat,
)

logger = logging.getLogger(__name__)

#: After so long without a look at the devices nothing more is asked of them: three looks at the
#: default interval. One that fails is nothing: NVML forgets a device for a moment after a reset.
PAUSE_SECONDS = 15.0
#: After so long the run ends, and the gate waits for the devices instead. Loading a driver anew
#: takes less; and an engine that was paused for so long has lost more than its start takes.
STOP_SECONDS = 120.0

#: Keeps a device from work; returns whether that is durable. Last, whether it is lost.
FenceOff = Callable[[GpuFacts, str, bool], bool]


class DeviceMonitor:
    """Looks at the devices that a run uses; one thread looks, any may ask for the care.

    Args:
        read: Returns the devices that CUDA shows, in its order, or why they cannot be read.
        devices: How many of them the engine uses, from the first.
        limits: What they may be at most.
        fence_off: Called with a device that has a fault, until it returns True.
        policy: How fast work is taken away from hot devices.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[GpuFacts] | GpuUnreadable],
        *,
        devices: int,
        limits: GpuLimits,
        fence_off: FenceOff,
        policy: ThermalPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._devices = devices
        self._limits = limits
        self._fence_off = fence_off
        self._policy = policy or ThermalPolicy()
        self._clock = clock
        #: As they were at the first look that made sense, in CUDA's order.
        self._first: tuple[GpuFacts, ...] = ()
        self._faulty: set[str] = set()
        self._to_fence: list[tuple[GpuFacts, str, bool]] = []
        self._thermal = ThermalState()
        self._seen_at = clock()
        #: When somebody who asks for the care first found that nobody looks.
        self._missed_at: float | None = None
        self._stop: str | None = None
        self._said = Throttle()

    def throttle(self) -> Throttle:
        """Return what a run may do now.

        Who looks may hang, at a disk or at the driver: then whoever asks here ends the run. That
        time counts from the first who asked in vain, so that a process that was itself stopped for
        an hour ends nothing.
        """
        now = self._clock()
        unseen = now - self._seen_at > PAUSE_SECONDS
        if not unseen:
            self._missed_at = None
        elif self._missed_at is None:
            self._missed_at = now
        elif self._stop is None and now - self._missed_at > STOP_SECONDS:
            self._stop = f"nobody has seen the devices for {now - self._seen_at:.0f} s"
        share = 0.0 if unseen or self._stop else self._thermal.share
        return Throttle(share=share, stop=self._stop)

    def look(self) -> tuple[GpuFacts, ...]:
        """Look at the devices, and return what they report; empty if they cannot be read."""
        seen = self._judge(self._read())
        self._to_fence = [fault for fault in self._to_fence if not self._fence_off(*fault)]
        self._say(seen)
        return seen

    def _judge(self, readings: Sequence[GpuFacts] | GpuUnreadable) -> tuple[GpuFacts, ...]:
        if isinstance(readings, GpuUnreadable):
            if readings.lost is not None and readings.lost < len(self._first):
                self._fault(self._first[readings.lost], "it has fallen off the bus", lost=True)
            return self._unseen(str(readings))
        if not self._first and len(readings) < self._devices:
            return self._unseen(f"{len(readings)} of {self._devices} GPU(s) are there")
        before = self._first or tuple(readings[: self._devices])
        found = {device.uuid: device for device in readings}
        for first in before:
            if first.uuid not in found and not first.mig_instance:
                self._fault(first, "it has fallen off the bus: NVML no longer shows it", lost=True)
        mine = tuple(found[first.uuid] for first in before if first.uuid in found)
        if impossible := [reason for device in mine for reason in nonsense(device)]:
            return self._unseen("; ".join(impossible))
        if len(mine) < self._devices:
            return self._unseen(f"{len(mine)} of {self._devices} GPU(s) are there")
        for first, device in zip(before, mine, strict=True):
            for fault in new_faults(first, device):
                self._fault(device, fault)
        self._first = tuple(map(recounted, before, mine))
        self._seen_at = self._clock()
        heat = heat_of(mine, self._limits, self._policy)
        self._thermal = next_state(self._thermal, heat, now=self._seen_at, policy=self._policy)
        return mine

    def _unseen(self, why: str) -> tuple[GpuFacts, ...]:
        self._thermal = unknown_heat(self._thermal)
        unseen = self._clock() - self._seen_at
        if self._stop is None and unseen > STOP_SECONDS:
            self._stop = f"the devices could not be read for {unseen:.0f} s: {why}"
        return ()

    def _fault(self, device: GpuFacts, fault: str, *, lost: bool = False) -> None:
        if device.hardware_uuid not in self._faulty:
            self._faulty.add(device.hardware_uuid)
            # Before the run learns of it: nobody shall take up a device that it has let go.
            if not self._fence_off(device, fault, lost):
                self._to_fence.append((device, fault, lost))
        if self._stop is None:
            self._stop = f"GPU {device.index} ({device.name}) is fenced: {fault}"

    def _say(self, seen: Sequence[GpuFacts]) -> None:
        """Say in the log when what a run may do has changed."""
        before, now = self._said, self.throttle()
        if now == before:
            return
        self._said = now
        heat = ", ".join(f"GPU {device.index} {device.temperature_celsius} °C" for device in seen)
        level = logging.INFO if now.share > before.share else logging.WARNING
        what = now.stop or f"{now.share:.1%} of the window may be used"
        logger.log(level, "%s (%s)", what, heat or "the devices cannot be read")
