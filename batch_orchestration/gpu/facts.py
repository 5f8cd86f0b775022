"""Facts that a GPU reports: plain values with units. None means not reported."""

import msgspec


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True):
    """A process that computes on a device.

    Attributes:
        name: None if the driver does not report it, as across containers.
        memory_bytes: Device memory that it holds.
    """

    pid: int
    name: str | None = None
    memory_bytes: int | None = None


class GpuFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One device at one moment.

    Attributes:
        index: NVML's index, in the order of the PCI bus.
        memory_used_bytes: By all processes and the driver.
        slowdown_celsius: Temperature from which on the device slows itself down.
        shutdown_celsius: Temperature at which it turns itself off.
        utilization_percent: Share of the time in which anything was computed.
        power_limit_watts: Current limit of its power draw.
        sm_clock_mhz: Clock of the processors that compute; `sm_clock_max_mhz` is its maximum.
        throttle_reasons: Reasons why the clock is not higher now; empty if there are none.
        ecc_uncorrectable_errors: Memory errors since the driver was loaded.
        remap_pending: The next reset takes a broken row of memory out of use.
        remap_failed: A broken row of memory could not be taken out of use.
        recovery_action: Requested by the driver after a fault (Xid): `none`, `gpu_reset`, …
        processes: Processes that compute on the device, without those that only draw (a desktop).
        mig_enabled: Whether the device is split into MIG instances.
        mig_instance: Whether this is such an instance; its memory is then the instance's own.
        device_uuid: UUID of the whole device, if this is an instance of it.
        xids: Numbers of the faults that the driver has reported since listening began.
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
        """UUID of the whole device, also for an instance: heat and faults affect all of it."""
        return self.device_uuid or self.uuid
