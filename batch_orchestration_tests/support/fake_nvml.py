"""A stand-in for the module `pynvml`, function by function, with its real errors and numbers.

Each value of a device can be an exception of `pynvml`, which its function then raises.
"""

import types
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pynvml  # noqa: TID253 - nothing but its names is used here

GIB = 2**30
NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
GPU_IS_LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
NO_LIBRARY = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
UNKNOWN = pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)


def told(value: Any) -> Any:
    """Return a value, or raise it if it is an exception."""
    if isinstance(value, Exception):
        raise value
    return value


@dataclass
class FakeGpu:
    """One device, healthy and idle unless said otherwise."""

    uuid: str = "GPU-11111111-aaaa"
    #: What asking for the device gives, if not the device.
    handle: Any = None
    name: str = "NVIDIA Test"
    memory: Any = field(
        default_factory=lambda: SimpleNamespace(total=80 * GIB, used=1 * GIB, free=79 * GIB)
    )
    temperature: Any = 40
    slowdown: Any = 92
    shutdown: Any = 97
    #: Degrees left to the slowdown; asked where no threshold is told.
    margin: Any = 52
    utilization: Any = 3
    power_milliwatts: Any = 61_500
    power_limit_milliwatts: Any = 400_000
    sm_clock: Any = 1410
    sm_clock_max: Any = 1980
    memory_clock: Any = 1215
    event_reasons: Any = 0x1
    throttle_reasons: Any = 0x1
    ecc: Any = 0
    remapped: Any = (0, 0, 0, 0)
    recovery: Any = 0
    recovery_return: int = pynvml.NVML_SUCCESS
    #: Pid to bytes.
    processes: Any = field(default_factory=dict)
    mig: Any = (0, 0)
    #: An exception, where there is nothing to listen to.
    events: Any = None
    #: Xids that happen before the next look; only who has registered is told.
    xids: list[int] = field(default_factory=list)
    instances: dict[str, "FakeGpu"] = field(default_factory=dict)
    parent: "FakeGpu | None" = None
    uuid_error: Exception | None = None


class FakeNvml(types.ModuleType):
    """The module; `open` counts how often it was opened and not closed."""

    def __init__(self, *devices: FakeGpu, init: Exception | None = None) -> None:
        super().__init__("pynvml")
        self.devices = list(devices)
        self.init = init
        self.open = 0
        self.names: dict[int, str] = {}
        self.event_sets: list[list[FakeGpu]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("NVML", "nvmlClocks", "nvmlEventType")):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        told(self.init)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        told(self.devices[index].handle)
        return self.devices[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        for device in self.devices:
            if uuid in device.instances:
                return device.instances[uuid]
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceIsMigDeviceHandle(self, device: FakeGpu) -> int:
        return int(device.parent is not None)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, device: FakeGpu) -> FakeGpu:
        if device.parent is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return device.parent

    def nvmlDeviceGetIndex(self, device: FakeGpu) -> int:
        return self.devices.index(device)

    def nvmlDeviceGetUUID(self, device: FakeGpu) -> str:
        told(device.uuid_error)
        return device.uuid

    def nvmlDeviceGetName(self, device: FakeGpu) -> bytes:
        return device.name.encode()

    def nvmlDeviceGetMemoryInfo(self, device: FakeGpu) -> Any:
        return told(device.memory)

    def nvmlDeviceGetTemperature(self, device: FakeGpu, sensor: int) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return told(device.temperature)

    def nvmlDeviceGetTemperatureThreshold(self, device: FakeGpu, kind: int) -> int:
        if kind == pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN:
            return told(device.shutdown)
        assert kind == pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
        return told(device.slowdown)

    def nvmlDeviceGetMarginTemperature(self, device: FakeGpu) -> int:
        return told(device.margin)

    def nvmlDeviceGetUtilizationRates(self, device: FakeGpu) -> Any:
        return SimpleNamespace(gpu=told(device.utilization), memory=0)

    def nvmlDeviceGetPowerUsage(self, device: FakeGpu) -> int:
        return told(device.power_milliwatts)

    def nvmlDeviceGetEnforcedPowerLimit(self, device: FakeGpu) -> int:
        return told(device.power_limit_milliwatts)

    def nvmlDeviceGetClockInfo(self, device: FakeGpu, kind: int) -> int:
        if kind == pynvml.NVML_CLOCK_MEM:
            return told(device.memory_clock)
        assert kind == pynvml.NVML_CLOCK_SM
        return told(device.sm_clock)

    def nvmlDeviceGetMaxClockInfo(self, device: FakeGpu, kind: int) -> int:
        assert kind == pynvml.NVML_CLOCK_SM
        return told(device.sm_clock_max)

    def nvmlDeviceGetCurrentClocksEventReasons(self, device: FakeGpu) -> int:
        return told(device.event_reasons)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: FakeGpu) -> int:
        return told(device.throttle_reasons)

    def nvmlDeviceGetTotalEccErrors(self, device: FakeGpu, error_type: int, counter: int) -> int:
        assert (error_type, counter) == (
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            pynvml.NVML_VOLATILE_ECC,
        )
        return told(device.ecc)

    def nvmlDeviceGetRemappedRows(self, device: FakeGpu) -> tuple[int, ...]:
        return told(device.remapped)

    def nvmlDeviceGetFieldValues(self, device: FakeGpu, fields: list[int]) -> list[Any]:
        assert fields == [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
        value = SimpleNamespace(uiVal=told(device.recovery))
        return [SimpleNamespace(nvmlReturn=device.recovery_return, value=value)]

    def nvmlDeviceGetComputeRunningProcesses(self, device: FakeGpu) -> list[Any]:
        processes = told(device.processes)
        return [SimpleNamespace(pid=p, usedGpuMemory=held) for p, held in processes.items()]

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        if pid not in self.names:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return self.names[pid]

    def nvmlEventSetCreate(self) -> list[FakeGpu]:
        self.event_sets.append([])
        return self.event_sets[-1]

    def nvmlDeviceGetSupportedEventTypes(self, device: FakeGpu) -> int:
        told(device.events)
        return int(pynvml.nvmlEventTypeXidCriticalError | pynvml.nvmlEventTypeClock)

    def nvmlDeviceRegisterEvents(self, device: FakeGpu, types: int, events: list[FakeGpu]) -> None:
        assert types == pynvml.nvmlEventTypeXidCriticalError
        assert self.open
        device.xids.clear()
        events.append(device)

    def nvmlEventSetWait_v2(self, events: list[FakeGpu], milliseconds: int) -> Any:
        assert milliseconds == 0
        for device in events:
            if device.xids:
                return SimpleNamespace(
                    device=device,
                    eventType=pynvml.nvmlEventTypeXidCriticalError,
                    eventData=device.xids.pop(0),
                )
        raise pynvml.NVMLError(pynvml.NVML_ERROR_TIMEOUT)

    def nvmlDeviceGetMigMode(self, device: FakeGpu) -> tuple[int, int]:
        return told(device.mig)
