"""What a GPU tells about itself: plain values with units. None is what a device does not report."""

import msgspec


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that computes on a device.

    Attributes:
        name: None if the driver does not tell it, as across containers.
        memory_bytes: That it holds on the device.
    """

    pid: int
    name: str | None = None
    memory_bytes: int | None = None


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One device at one moment.

    Attributes:
        index: As NVML counts: in the order of the PCI bus.
        memory_used_bytes: By all processes and the driver.
        slowdown_celsius: Temperature from which on the device slows itself down.
        shutdown_celsius: And that at which it turns itself off.
        utilization_percent: Share of the time in which anything was computed.
        power_limit_watts: What it may draw at most now.
        sm_clock_mhz: Of the processors that compute; `sm_clock_max_mhz` is what it can be.
        throttle_reasons: Why the clock is not higher now, in words; empty if nothing holds it.
        ecc_uncorrectable_errors: Of memory, since the driver was loaded.
        remap_pending: A broken row of memory is taken out of use by the next reset.
        remap_failed: Such a row could not be taken out of use.
        recovery_action: What the driver asks for after a fault (Xid): `none`, `gpu_reset`, …
        processes: That compute on the device. What only draws, as a desktop, is not among them.
        mig_enabled: Whether it is cut into instances.
        mig_instance: Whether this is one of them: then the memory is the instance's own.
        device_uuid: Of the whole device, if this is an instance of it.
        xids: Numbers of the faults that the driver told since somebody listened to them.
    """

    index: int
    uuid: str
    name: str
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    temperature_celsius: int | None = None
    slowdown_celsius: int | None = None
    shutdown_celsius: int | None = None
    utilization_percent: int | None = None
    power_watts: float | None = None
    power_limit_watts: float | None = None
    sm_clock_mhz: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    ecc_uncorrectable_errors: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    recovery_action: str | None = None
    processes: tuple[GpuProcess, ...] | None = None
    mig_enabled: bool | None = None
    mig_instance: bool = False
    device_uuid: str | None = None
    xids: tuple[int, ...] = ()

    @property
    def hardware_uuid(self) -> str:
        """Of the device that gets hot and breaks: the whole one, also for an instance of it."""
        return self.device_uuid or self.uuid
