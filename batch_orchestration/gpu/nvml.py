"""Reads GPUs from the NVIDIA driver through NVML. The only module that imports `pynvml`.

NVML reports Xids only as events, to processes that listen when they happen (`ListeningReader`). The
driver's conclusion from them stays readable as the recovery action.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from batch_orchestration.core.errors import GpuUnreadable
from batch_orchestration.gpu.facts import GpuFacts, GpuProcess

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"
T = TypeVar("T")
#: Bits of `nvmlClocksEventReasons…`.
_THROTTLE_REASONS = {
    0x1: "gpu_idle",
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
#: Values of `nvmlDeviceGpuRecoveryAction_t`.
_RECOVERY_ACTIONS = {
    0: "none",
    1: "gpu_reset",
    2: "node_reboot",
    3: "drain_p2p",
    4: "drain_and_reset",
    5: "recover_imex_domain",
    6: "bus_reset",
    7: "system_reboot",
}
_MILLIWATTS = 1000


def read_gpus() -> tuple[GpuFacts, ...]:
    """Return the facts of the GPUs that CUDA shows to our processes, in its order.

    `CUDA_VISIBLE_DEVICES` is read as CUDA reads it: indices, UUIDs or their beginnings, MIG UUIDs;
    the list ends before the first that does not exist. Indices are in the order of the PCI bus,
    which the engine is configured to use as well.

    Raises:
        GpuUnreadable: NVML is missing or raised an error, even if for only one device.
    """
    with _nvml() as nvml:
        handles = _visible(nvml, os.environ)
        return tuple(_facts_of(nvml, place, handle) for place, handle in enumerate(handles))


def import_nvml() -> Any:
    """Import `pynvml`, which importing this module does not load.

    Raises:
        GpuUnreadable: It is not installed.
    """
    try:
        import pynvml
    except ImportError as error:
        raise GpuUnreadable(
            f"NVML cannot be used, because pynvml is not installed: {error}"
        ) from error
    return pynvml


@contextmanager
def _nvml() -> Iterator[Any]:
    pynvml = import_nvml()
    try:
        pynvml.nvmlInit()
        try:
            yield pynvml
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise GpuUnreadable(f"NVML says: {error}") from error


def _visible(nvml: Any, environ: Any) -> list[Any]:
    """Return the handles of the devices that CUDA shows."""
    count = nvml.nvmlDeviceGetCount()
    named = environ.get(VISIBLE_VARIABLE)
    words = named.split(",") if named is not None else [str(index) for index in range(count)]
    handles: list[Any] = []
    uuids: list[str] = []
    for place, word in enumerate(words):
        with _readable(nvml, place):
            handle = _handle(nvml, word.strip(), count)
            if handle is None:
                break
            uuid = text_of(nvml.nvmlDeviceGetUUID(handle))
        if uuid in uuids:
            # CUDA shows no device at all if one is listed twice.
            return []
        uuids.append(uuid)
        handles.append(handle)
    return handles


def _handle(nvml: Any, word: str, count: int) -> Any | None:
    """Return the device that an entry of the variable names; None if there is none."""
    if word.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(word)) if int(word) < count else None
    if word.startswith("MIG-"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(word)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
            return None
    if not word.startswith("GPU-"):
        return None
    found: list[Any] = []
    lost: Exception | None = None
    for index in range(count):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            if text_of(nvml.nvmlDeviceGetUUID(handle)).startswith(word):
                found.append(handle)
        except nvml.NVMLError_GpuIsLost as error:
            # The lost device is the named one only if no other device matches.
            lost = error
    if not found and lost is not None:
        raise lost
    return found[0] if len(found) == 1 else None


def _facts_of(nvml: Any, place: int, handle: Any) -> GpuFacts:
    with _readable(nvml, place):
        facts = _facts(nvml, handle)
    try:
        return msgspec.convert(msgspec.to_builtins(facts), GpuFacts)
    except (msgspec.ValidationError, TypeError) as error:
        raise GpuUnreadable(f"GPU {place} of those visible reports nonsense: {error}") from error


@contextmanager
def _readable(nvml: Any, place: int) -> Iterator[None]:
    try:
        yield
    except nvml.NVMLError as error:
        raise GpuUnreadable(
            f"GPU {place} of those visible cannot be read: {error}",
            lost=place if isinstance(error, nvml.NVMLError_GpuIsLost) else None,
        ) from error


def _facts(nvml: Any, handle: Any) -> GpuFacts:
    instance = bool(_reported(nvml, lambda: nvml.nvmlDeviceIsMigDeviceHandle(handle)))
    # For an instance, NVML reports its memory; heat, power and faults are the whole device's.
    device = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if instance else handle
    memory = _reported(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    rates = _reported(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(device))
    celsius = _reported(
        nvml, lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)
    )
    remapped = _reported(nvml, lambda: nvml.nvmlDeviceGetRemappedRows(device))
    mig = _reported(nvml, lambda: nvml.nvmlDeviceGetMigMode(device))
    return GpuFacts(
        index=nvml.nvmlDeviceGetIndex(device),
        uuid=text_of(nvml.nvmlDeviceGetUUID(handle)),
        name=text_of(nvml.nvmlDeviceGetName(handle)),
        memory_total_bytes=memory and memory.total,
        memory_used_bytes=memory and memory.used,
        memory_free_bytes=memory and memory.free,
        temperature_celsius=celsius,
        slowdown_celsius=_slowdown(nvml, device, celsius),
        shutdown_celsius=_threshold(nvml, device, nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN),
        utilization_percent=rates and rates.gpu,
        power_watts=_watts(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(device)),
        power_limit_watts=_watts(nvml, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device)),
        sm_clock_mhz=_reported(
            nvml, lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)
        ),
        sm_clock_max_mhz=_reported(
            nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM)
        ),
        memory_clock_mhz=_reported(
            nvml, lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM)
        ),
        throttle_reasons=_throttle_reasons(nvml, device),
        ecc_uncorrectable_errors=_reported(
            nvml,
            lambda: nvml.nvmlDeviceGetTotalEccErrors(
                device, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            ),
        ),
        remap_pending=None if remapped is None else bool(remapped[2]),
        remap_failed=None if remapped is None else bool(remapped[3]),
        recovery_action=_recovery_action(nvml, device),
        processes=_processes(nvml, handle),
        mig_enabled=None if mig is None else bool(mig[0]),
        mig_instance=instance,
        device_uuid=text_of(nvml.nvmlDeviceGetUUID(device)) if instance else None,
    )


def _reported(nvml: Any, ask: Callable[[], T]) -> T | None:
    """Return a reported value; None if the device or its driver does not support it."""
    try:
        return ask()
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return None


def _watts(nvml: Any, ask: Callable[[], float]) -> float | None:
    milliwatts = _reported(nvml, ask)
    return None if milliwatts is None else milliwatts / _MILLIWATTS


def _threshold(nvml: Any, device: Any, kind: int) -> int | None:
    return _reported(nvml, lambda: nvml.nvmlDeviceGetTemperatureThreshold(device, kind))


def _slowdown(nvml: Any, device: Any, celsius: int | None) -> int | None:
    """Return the temperature from which on the device slows down.

    From Hopper on, devices report no threshold, but the degrees left to it.
    """
    reported = _threshold(nvml, device, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
    if reported is not None or celsius is None:
        return reported
    margin: int | None = _reported(nvml, lambda: nvml.nvmlDeviceGetMarginTemperature(device))
    return None if margin is None else celsius + margin


def _throttle_reasons(nvml: Any, device: Any) -> tuple[str, ...] | None:
    bits = _reported(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(device))
    if bits is None:
        # The same in older drivers.
        bits = _reported(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device))
    if bits is None:
        return None
    unknown = bits & ~sum(_THROTTLE_REASONS)
    words = [word for bit, word in _THROTTLE_REASONS.items() if bits & bit]
    return (*words, *([f"unknown_{unknown:#x}"] if unknown else []))


def _recovery_action(nvml: Any, device: Any) -> str | None:
    asked = [nvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION]
    values = _reported(nvml, lambda: nvml.nvmlDeviceGetFieldValues(device, asked))
    # A driver older than the field reports an invalid argument.
    known = (nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_INVALID_ARGUMENT)
    if values is None or values[0].nvmlReturn in known:
        return None
    if values[0].nvmlReturn != nvml.NVML_SUCCESS:
        raise nvml.NVMLError(values[0].nvmlReturn)
    action = values[0].value.uiVal
    return _RECOVERY_ACTIONS.get(action, f"action_{action}")


def _processes(nvml: Any, handle: Any) -> tuple[GpuProcess, ...] | None:
    found: Sequence[Any] | None = _reported(
        nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    )
    if found is None:
        return None
    return tuple(
        GpuProcess(
            pid=process.pid,
            name=_process_name(nvml, process.pid),
            memory_bytes=process.usedGpuMemory,
        )
        for process in found
    )


def _process_name(nvml: Any, pid: int) -> str | None:
    """Return the program of a process; None if it is hidden, as it may be across containers."""
    try:
        return text_of(nvml.nvmlSystemGetProcessName(pid)) or None
    except nvml.NVMLError:
        # The process has ended or is hidden from us; its pid is reported all the same.
        return None


def text_of(value: str | bytes) -> str:
    """Return a text of NVML's, which older bindings give as bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


logger = logging.getLogger(__name__)


class ListeningReader:
    """Reads the GPUs together with every Xid since its first reading.

    NVML keeps events for a registered listener until they are fetched, so none is missed between
    two readings. If listening is impossible, that is logged once and the facts are read all the
    same. Once started, listening goes on until the process ends.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        self._events: Any = None
        self._complained = False
        self._heard: defaultdict[str, list[int]] = defaultdict(list)

    def read(self) -> tuple[GpuFacts, ...]:
        """Return the facts of the GPUs as `read_gpus` does, with their Xids.

        Raises:
            GpuUnreadable: See `read_gpus`.
        """
        if self._events is None:
            self._listen()
        self._fetch()
        return tuple(
            msgspec.structs.replace(gpu, xids=tuple(self._heard[gpu.hardware_uuid]))
            for gpu in read_gpus()
        )

    def _listen(self) -> None:
        nvml = import_nvml()
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            # A fault of NVML itself is reported by reading.
            return
        try:
            events = nvml.nvmlEventSetCreate()
            for index in range(nvml.nvmlDeviceGetCount()):
                self._register(nvml, index, events)
        except nvml.NVMLError as error:
            self._complain("the GPUs", error)
            nvml.nvmlShutdown()
        else:
            self._nvml, self._events = nvml, events

    def _register(self, nvml: Any, index: int, events: Any) -> None:
        wanted = nvml.nvmlEventTypeXidCriticalError
        try:
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            if nvml.nvmlDeviceGetSupportedEventTypes(device) & wanted:
                nvml.nvmlDeviceRegisterEvents(device, wanted, events)
        except nvml.NVMLError as error:
            # The run may use another device.
            self._complain(f"GPU {index}", error)

    def _complain(self, which: str, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            logger.info("cannot listen for Xids of %s: %s", which, error)

    def _fetch(self) -> None:
        while self._events is not None:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
                codes = self._heard[text_of(self._nvml.nvmlDeviceGetUUID(event.device))]
            except self._nvml.NVMLError:
                # No event is left (`NVMLError_Timeout`), or the device is lost: reading reports it.
                return
            if event.eventType & self._nvml.nvmlEventTypeXidCriticalError:
                codes.append(int(event.eventData))
