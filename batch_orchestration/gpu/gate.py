"""The gate before work on a GPU: reasons against starting an engine. It fails closed.

A value that a device does not support is not held against it, except for its memory: without that
it is unknown whether the model fits. Unreadable and impossible values are held against it.
"""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from batch_orchestration.core.errors import GpuUnreadable
from batch_orchestration.gpu.facts import GpuFacts, GpuProcess

#: Margin below the temperature at which the device slows itself down.
SLOWDOWN_MARGIN_CELSIUS = 5
#: For devices that do not report that temperature: most slow down at 87 to 95.
DEFAULT_MAX_CELSIUS = 85
#: A process that computes holds several times as much for its CUDA context alone; the MPS server
#: and monitoring agents hold less.
TOLERATED_BYTES = 64 * 2**20
_CELSIUS = (-50, 150)
_BYTES = (0, 2**50)
_MHZ = (0, 10_000)
_WATTS = (0, 10_000)
#: Values outside are impossible on any device: mostly overflows, or codes for an error.
_POSSIBLE = {
    "memory_total_bytes": (1, _BYTES[1]),
    "memory_used_bytes": _BYTES,
    "memory_free_bytes": _BYTES,
    "temperature_celsius": _CELSIUS,
    "slowdown_celsius": _CELSIUS,
    "shutdown_celsius": _CELSIUS,
    "utilization_percent": (0, 100),
    "power_watts": _WATTS,
    "power_limit_watts": _WATTS,
    "sm_clock_mhz": _MHZ,
    "sm_clock_max_mhz": _MHZ,
    "memory_clock_mhz": _MHZ,
    "ecc_uncorrectable_errors": (0, 2**53),
}
_GIB = 2**30


class GpuNeed(msgspec.Struct, frozen=True, kw_only=True):
    """Resources that an engine needs.

    Attributes:
        memory_bytes: Free memory on each of the devices; None if unknown, and then not judged.
        why: Derivation of that number.
    """

    devices: int = 1
    memory_bytes: int | None = None
    why: str = ""


def unhealthy_reasons(
    readings: Sequence[GpuFacts] | GpuUnreadable,
    *,
    need: GpuNeed,
    max_celsius: float | None = None,
    own: frozenset[int] = frozenset(),
    fences: Mapping[str, str] | None = None,
) -> list[str]:
    """Return the reasons against starting an engine now; empty if the devices are healthy.

    Args:
        readings: The devices that CUDA will show, in its order, or why they are unreadable.
        max_celsius: See `limit_celsius`.
        own: Pids of our own engines, which are no strangers.
        fences: Why a device is fenced, by the UUID of the whole device.
    """
    if isinstance(readings, GpuUnreadable):
        return [str(readings)]
    if len(readings) < need.devices:
        found = "none" if not readings else f"only {len(readings)}"
        return [f"{need.devices} GPU(s) needed, {found} there (CUDA_VISIBLE_DEVICES counts)"]
    return [
        f"GPU {device.index} ({device.name}): {reason}"
        for device in readings[: need.devices]
        for reason in (
            *_fenced(device, fences or {}),
            *_reasons(device, max_celsius, need, own),
        )
    ]


def _fenced(device: GpuFacts, fences: Mapping[str, str]) -> Iterator[str]:
    if (why := fences.get(device.hardware_uuid)) is not None:
        yield (
            f"{why}; once it is well: python -m batch_orchestration gpu --clear"
            f" {device.hardware_uuid}"
        )


def _reasons(
    device: GpuFacts, max_celsius: float | None, need: GpuNeed, own: frozenset[int]
) -> Iterator[str]:
    impossible = list(nonsense(device))
    yield from impossible
    if impossible:
        # All other reasons would be based on these values.
        return
    yield from _heat(device, max_celsius)
    yield from standing_faults(device)
    if device.mig_enabled and not device.mig_instance:
        yield "it is cut into MIG instances; name one in CUDA_VISIBLE_DEVICES (MIG-…)"
    for process in device.processes or ():
        if process.pid not in own and _holds_memory(process):
            yield f"{_described(process)}, which is not ours"
    yield from _memory(device, need)


def nonsense(device: GpuFacts) -> Iterator[str]:
    """Yield the reported values that cannot be true."""
    for name, possible in _POSSIBLE.items():
        value = getattr(device, name)
        # Written so that NaN is outside any range.
        if value is not None and not possible[0] <= value <= possible[1]:
            yield f"it reports nonsense: {name} is {value}"
    total = device.memory_total_bytes
    for name in ("memory_used_bytes", "memory_free_bytes"):
        value = getattr(device, name)
        if None not in (value, total) and value > total:
            yield f"it reports nonsense: {name} is {value} of {total}"
    for process in device.processes or ():
        if process.memory_bytes is not None and process.memory_bytes < 0:
            yield f"it reports nonsense: process {process.pid} holds {process.memory_bytes} bytes"


def limit_celsius(device: GpuFacts, max_celsius: float | None) -> float:
    """Return the temperature above which no engine is started on a device.

    Args:
        max_celsius: None for 5 below the device's slowdown threshold, or 85 if it reports none.
    """
    if max_celsius is not None:
        return max_celsius
    if device.slowdown_celsius is None:
        return DEFAULT_MAX_CELSIUS
    return device.slowdown_celsius - SLOWDOWN_MARGIN_CELSIUS


def _heat(device: GpuFacts, max_celsius: float | None) -> Iterator[str]:
    limit = limit_celsius(device, max_celsius)
    if device.temperature_celsius is not None and device.temperature_celsius > limit:
        yield f"{device.temperature_celsius} °C, {limit:g} °C allowed"


def standing_faults(device: GpuFacts) -> Iterator[str]:
    """Yield the faults of a device that do not pass by themselves."""
    if device.ecc_uncorrectable_errors:
        count = device.ecc_uncorrectable_errors
        yield f"{count} uncorrectable memory errors (ECC) since the driver was loaded; reset it"
    if device.remap_failed:
        yield "a broken row of memory could not be remapped; the device is to be replaced"
    if device.remap_pending:
        yield "a broken row of memory waits to be remapped; reset it"
    if device.recovery_action not in (None, "none"):
        yield f"after a fault (Xid) the driver asks for {device.recovery_action}"


def _holds_memory(process: GpuProcess) -> bool:
    return process.memory_bytes is None or process.memory_bytes > TOLERATED_BYTES


def _described(process: GpuProcess) -> str:
    held = "an unknown amount of memory"
    if process.memory_bytes is not None:
        held = f"{process.memory_bytes / _GIB:.1f} GiB"
    return f"pid {process.pid} ({process.name or 'name unknown'}) holds {held}"


def _memory(device: GpuFacts, need: GpuNeed) -> Iterator[str]:
    if device.memory_free_bytes is None or device.memory_total_bytes is None:
        yield "it does not report its memory"
        return
    if need.memory_bytes is None:
        return
    free = device.memory_free_bytes
    if free < need.memory_bytes:
        yield (
            f"{free / _GIB:.1f} GiB of {device.memory_total_bytes / _GIB:.1f} GiB are free,"
            f" {need.memory_bytes / _GIB:.1f} GiB needed: {need.why}"
        )
