"""Faults of a GPU that end its work, and the fence that keeps it out of use afterwards.

Heat passes; a fault does not. Results from broken memory may be wrong without any error, so the
device stays out of use until a reset is observed.
"""

from collections.abc import Iterator

import msgspec

from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.gate import nonsense, standing_faults

#: Xids that do not indicate a broken device. Most are errors of the program that used it, which
#: NVIDIA's own health check of devices ignores, too (k8s-device-plugin, `ignoredXids`). 154 reports
#: that the recovery action has changed, which is read directly.
HARMLESS_XIDS = frozenset({13, 31, 43, 45, 68, 109, 154})


class Fence(msgspec.Struct, frozen=True, kw_only=True):
    """A device that must not be used, and the reason.

    Attributes:
        uuid: UUID of the device; for a MIG instance, that of the whole device.
        by: The run that put up the fence.
        boot_id: The boot in which that happened; None if the file of the fence is unreadable.
        facts: The device at that time; None if it was lost, or if the file is unreadable.
        cleared_at: Time at which it was removed; None while it is in force.
        cleared_by: A person, or the recovery check.
    """

    uuid: str
    at: float
    reason: str
    by: str
    boot_id: str | None = None
    facts: GpuFacts | None = None
    cleared_at: float | None = None
    cleared_by: str = ""


def new_faults(before: GpuFacts, now: GpuFacts) -> Iterator[str]:
    """Yield the faults that a device has developed since its first check.

    These are Xids, and the faults from `standing_faults` that did not exist before.
    """
    for xid in now.xids:
        if xid not in HARMLESS_XIDS:
            yield f"the driver reported Xid {xid}"
    counted = before.ecc_uncorrectable_errors or 0
    grown = (now.ecc_uncorrectable_errors or 0) - counted
    if grown > 0:
        yield f"{grown} uncorrectable memory errors (ECC) while it worked"
    rest = msgspec.structs.replace(now, ecc_uncorrectable_errors=None)
    had = set(standing_faults(msgspec.structs.replace(before, ecc_uncorrectable_errors=None)))
    yield from (fault for fault in standing_faults(rest) if fault not in had)


def recounted(before: GpuFacts, now: GpuFacts) -> GpuFacts:
    """Return the next baseline: `before`, with the count of errors lowered if it restarted."""
    count, counted = now.ecc_uncorrectable_errors, before.ecc_uncorrectable_errors
    if count is None or counted is None or count >= counted:
        return before
    return msgspec.structs.replace(before, ecc_uncorrectable_errors=count)


def holds_because(fence: Fence, device: GpuFacts, *, boot_id: str) -> str | None:
    """Return why a fence has to stay; None if the device has visibly recovered.

    Recovery needs two observations. First, no fault is left. Second, the device was reset after the
    fence was put up, since a fault that merely no longer shows is no recovery. A reset shows in
    another boot id, or in a lower count of memory errors. That count restarts only when the device
    is reset or the driver loaded again ("volatile counts are reset each time the driver loads",
    NVML API reference, `nvmlEccCounterType_t`). A person with other evidence clears the fence.
    """
    if wrong := [*nonsense(device), *standing_faults(device)]:
        return "; ".join(wrong)
    count = device.ecc_uncorrectable_errors
    counted = None if fence.facts is None else fence.facts.ecc_uncorrectable_errors
    if counted is not None and count is None:
        return "it no longer reports its memory errors"
    restarted = counted is not None and count is not None and count < counted
    if restarted or fence.boot_id not in (None, boot_id):
        return None
    return "nothing shows that it was reset since"
