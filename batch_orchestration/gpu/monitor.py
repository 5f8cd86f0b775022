"""Monitors the devices of a run: how much work they may get now, and when the run must end.

Fails closed: without a recent good reading, the devices get no work; if that lasts, the run ends.
"""

import logging
import time
from collections.abc import Callable, Sequence

from batch_orchestration.core.errors import GpuUnreadable
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.faults import new_faults, recounted
from batch_orchestration.gpu.gate import nonsense
from batch_orchestration.gpu.thermal import (
    ThermalState,
    Throttle,
    heat_of,
    next_state,
    unknown_heat,
)

logger = logging.getLogger(__name__)

#: After this long without a reading, the devices get no more work: three checks at the default
#: interval. One failed check is harmless: NVML loses a device for a moment after a reset.
PAUSE_SECONDS = 15.0
#: After this long the run ends, and the gate waits for the devices instead. Reloading a driver
#: takes less, and a pause this long costs the engine more than a restart.
STOP_SECONDS = 120.0

#: Fences a device, given its fault and whether it is lost; returns whether the fence is durable.
FenceOff = Callable[[GpuFacts, str, bool], bool]


class DeviceMonitor:
    """Checks the devices that a run uses: one thread calls `look`, any may call `throttle`.

    Args:
        read: Returns the devices that CUDA shows, in its order, or why they cannot be read.
        devices: Number of them that the engine uses, from the first.
        max_celsius: See `gate.limit_celsius`.
        fence_off: Called with a device that has a fault, until it returns True.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[GpuFacts] | GpuUnreadable],
        *,
        devices: int,
        max_celsius: float | None,
        fence_off: FenceOff,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._devices = devices
        self._max_celsius = max_celsius
        self._fence_off = fence_off
        self._clock = clock
        #: The devices at the first plausible reading, in CUDA's order.
        self._first: tuple[GpuFacts, ...] = ()
        self._faulty: set[str] = set()
        self._to_fence: list[tuple[GpuFacts, str, bool]] = []
        self._thermal = ThermalState()
        self._seen_at = clock()
        #: When a caller of `throttle` first found the reading too old.
        self._missed_at: float | None = None
        self._stop: str | None = None
        self._said = Throttle()

    def throttle(self) -> Throttle:
        """Return how much work the run may do now.

        If the checking thread hangs at a disk or at the driver, the caller stops the run after
        `STOP_SECONDS`. The timer starts at the first call that finds the reading too old, so a
        process resumed after a suspension is not stopped at once.
        """
        now = self._clock()
        unseen = now - self._seen_at > PAUSE_SECONDS
        if not unseen:
            self._missed_at = None
        elif self._missed_at is None:
            self._missed_at = now
        elif self._stop is None and now - self._missed_at > STOP_SECONDS:
            self._stop = f"the devices have not been read for {now - self._seen_at:.0f} s"
        share = 0.0 if unseen or self._stop else self._thermal.share
        return Throttle(share=share, stop=self._stop)

    def look(self) -> tuple[GpuFacts, ...]:
        """Check the devices and return their facts; empty if they cannot be read."""
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
        heat = heat_of(mine, self._max_celsius)
        self._thermal = next_state(self._thermal, heat, now=self._seen_at)
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
            # Fenced before the run stops: no other run may start on the device that it frees.
            if not self._fence_off(device, fault, lost):
                self._to_fence.append((device, fault, lost))
        if self._stop is None:
            self._stop = f"GPU {device.index} ({device.name}) is fenced: {fault}"

    def _say(self, seen: Sequence[GpuFacts]) -> None:
        """Log a change of the throttle."""
        before, now = self._said, self.throttle()
        if now == before:
            return
        self._said = now
        heat = ", ".join(f"GPU {device.index} {device.temperature_celsius} °C" for device in seen)
        level = logging.INFO if now.share > before.share else logging.WARNING
        what = now.stop or f"{now.share:.1%} of the window may be used"
        logger.log(level, "%s (%s)", what, heat or "the devices cannot be read")
