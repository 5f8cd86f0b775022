"""Faults of a GPU that end its work, and the fence around it until somebody has seen to it.

Heat passes; a fault does not. What was computed next on a device with broken memory may be wrong
without a word, so the device is left alone until it was reset, and until that is known.
"""

from collections.abc import Iterator

import msgspec

from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.gate import nonsense, standing_faults

#: Xids that say nothing against the device: errors of the program that used it, which NVIDIA's own
#: health check of devices leaves out, too (k8s-device-plugin, `ignoredXids`); and 154, which tells
#: that the recovery action has changed: that is read itself.
HARMLESS_XIDS = frozenset({13, 31, 43, 45, 68, 109, 154})


class Fence(msgspec.Struct, frozen=True, kw_only=True):
    """That a device is not to be used, and why.

    Attributes:
        uuid: Of the device; of an instance (MIG) that of the whole device.
        at: POSIX seconds.
        by: The run that put it up.
        boot_id: Of the boot in which that was; None if the file of the fence cannot be read.
        facts: Of the device when it was put up; None if it was lost, or as above.
    """

    uuid: str
    at: float
    reason: str
    by: str
    boot_id: str | None = None
    facts: GpuFacts | None = None


class ClearedFence(msgspec.Struct, frozen=True, kw_only=True):
    """A fence that is no longer in force.

    Attributes:
        at: POSIX seconds.
        by: A person, or the recovery check.
    """

    fence: Fence
    at: float
    by: str


def new_faults(before: GpuFacts, now: GpuFacts) -> Iterator[str]:
    """Yield the faults that a device has got since it was first looked at.

    Everything that `standing_faults` tells and was not there before, and Xids.
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
    """Return what to compare with next: as before, but for a count of errors that began anew."""
    count, counted = now.ecc_uncorrectable_errors, before.ecc_uncorrectable_errors
    if count is None or counted is None or count >= counted:
        return before
    return msgspec.structs.replace(before, ecc_uncorrectable_errors=count)


def holds_because(fence: Fence, device: GpuFacts, *, boot_id: str) -> str | None:
    """Return why a fence has to stay; None if the device can be seen to have recovered.

    Two things must be seen. First, no fault is left. Second, the device was reset after the fence
    was put up, for a fault that merely no longer shows is no recovery: the machine has booted since
    (another boot id), or the count of memory errors has begun anew, which it only does when the
    device is reset or the driver loaded again ("volatile counts are reset each time the driver
    loads", NVML API reference, `nvmlEccCounterType_t`). Whatever else a person knows, they say by
    clearing the fence.
    """
    if wrong := [*nonsense(device), *standing_faults(device)]:
        return "; ".join(wrong)
    count = device.ecc_uncorrectable_errors
    counted = None if fence.facts is None else fence.facts.ecc_uncorrectable_errors
    if counted is not None and count is None:
        return "it no longer tells its memory errors"
    began_anew = counted is not None and count is not None and count < counted
    if began_anew or fence.boot_id not in (None, boot_id):
        return None
    return "nothing shows that it was reset since"
