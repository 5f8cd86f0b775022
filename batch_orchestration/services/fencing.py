"""Fencing: devices that had a fault are kept from work until they are known to be well."""

import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from batch_orchestration.core.errors import StorageError
from batch_orchestration.domain.gpu import GpuFacts
from batch_orchestration.domain.gpu_faults import Fence, holds_because
from batch_orchestration.engines.processes.records import boot_id
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.storage.fences import clear_fence, put_up_fence, read_fences

logger = logging.getLogger(__name__)

#: Who clears a fence where it was no person.
RECOVERY_CHECK = "recovery check"


def fence_off(folder: DataFolder, device: GpuFacts, reason: str, lost: bool, *, by: str) -> bool:
    """Keep a device from work until it is known to be well; return whether that is durable.

    Args:
        folder: The data folder.
        device: As it was seen last.
        reason: The fault.
        lost: Whether it cannot be seen any more; then only a restart or a person lifts the fence.
        by: The run.
    """
    fence = Fence(
        uuid=device.hardware_uuid,
        at=time.time(),
        reason=reason,
        by=by,
        boot_id=boot_id(),
        facts=None if lost else device,
    )
    try:
        if put_up_fence(folder, fence):
            logger.error("GPU %s is fenced: %s", fence.uuid, reason)
    except StorageError as error:
        logger.error("GPU %s cannot be fenced, it is tried again: %s", fence.uuid, error)  # noqa: TRY400
        return False
    return True


def standing_fences(folder: DataFolder, devices: Sequence[GpuFacts]) -> dict[str, str]:
    """Return why devices are fenced, by uuid, after the recovery check of those that can be seen.

    A fence comes down by itself as soon as `holds_because` finds nothing against that. Whoever
    looks at the gate makes the check, so that no process is needed for it.

    Fails closed: if nobody can tell whether there are fences, every device is fenced.
    """
    try:
        fences = read_fences(folder)
    except StorageError as error:
        return dict.fromkeys(
            (device.hardware_uuid for device in devices),
            f"nobody can tell whether it is fenced: {error}",
        )
    seen = {device.hardware_uuid: device for device in devices}
    return {
        uuid: why
        for uuid, fence in fences.items()
        if (why := _standing(folder, uuid, fence, seen.get(uuid))) is not None
    }


def _standing(folder: DataFolder, uuid: str, fence: Fence, device: GpuFacts | None) -> str | None:
    since = datetime.fromtimestamp(fence.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    fenced = f"fenced since {since}: {fence.reason}"
    if device is None:
        return fenced
    held = holds_because(fence, device, boot_id=boot_id())
    if held is not None:
        return f"{fenced} ({held})"
    try:
        clear_fence(folder, uuid, at=time.time(), by=RECOVERY_CHECK)
    except StorageError as error:
        return f"{fenced} (it has recovered, but the fence cannot be removed: {error})"
    logger.warning("GPU %s has recovered and is not fenced any more: %s", uuid, fenced)
    return None
