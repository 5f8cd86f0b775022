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
        utilization_percent: Share of the time in which anything was computed.
        throttle_reasons: Why the clock is not higher now, in words; empty if nothing holds it.
        ecc_uncorrectable_errors: Of memory, since the driver was loaded.
        remap_pending: A broken row of memory is taken out of use by the next reset.
        remap_failed: Such a row could not be taken out of use.
        recovery_action: What the driver asks for after a fault (Xid): `none`, `gpu_reset`, …
        processes: That compute on the device. What only draws, as a desktop, is not among them.
        mig_enabled: Whether it is cut into instances.
        mig_instance: Whether this is one of them: then the memory is the instance's own.
    """

    index: int
    uuid: str
    name: str
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    temperature_celsius: int | None = None
    slowdown_celsius: int | None = None
    utilization_percent: int | None = None
    power_watts: float | None = None
    sm_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    ecc_uncorrectable_errors: int | None = None
    remap_pending: bool | None = None
    remap_failed: bool | None = None
    recovery_action: str | None = None
    processes: tuple[GpuProcess, ...] | None = None
    mig_enabled: bool | None = None
    mig_instance: bool = False
