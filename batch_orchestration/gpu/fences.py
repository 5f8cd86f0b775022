"""Fences: one file per device that must not be used, until a person or a check removes it."""

import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.engines.processes.records import boot_id
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.faults import Fence, holds_because


def fence_path(folder: DataFolder, uuid: str) -> Path:
    """Return the path of a device's fence; the existence of the file is the decision."""
    return folder.fences / f"{uuid.replace('/', '_')}.json"


def put_up_fence(folder: DataFolder, fence: Fence) -> bool:
    """Store a fence durably and return True; an existing fence is left as it is.

    Raises:
        StorageError: It cannot be written.
    """
    file = StateFile(fence_path(folder, fence.uuid), Fence)
    if file.path.exists():
        return False
    file.write(fence)
    return True


def read_fences(folder: DataFolder) -> dict[str, Fence]:
    """Return the fences by the UUID of the device. An unreadable fence still counts.

    Raises:
        StorageError: The folder is unreadable, so the fences are unknown.
    """
    try:
        paths = [path for path in folder.fences.iterdir() if path.suffix == ".json"]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"cannot read {folder.fences}: {error.strerror or error}") from error
    return {path.stem: fence for path in sorted(paths) if (fence := _read(path)) is not None}


def clear_fence(folder: DataFolder, uuid: str, *, at: float, by: str) -> Fence | None:
    """Remove the fence of a device and record who removed it; None if there is none.

    Raises:
        StorageError: It cannot be removed, and stays in force.
    """
    path = fence_path(folder, uuid)
    fence = _read(path)
    if fence is None:
        return None
    cleared = msgspec.structs.replace(fence, cleared_at=at, cleared_by=by)
    StateFile(folder.fences / "cleared" / f"{path.stem}-{at:.3f}.json", Fence).write(cleared)
    StateFile(path, Fence).remove()
    return fence


def _read(path: Path) -> Fence | None:
    try:
        return StateFile(path, Fence).read()
    except StorageError as error:
        return Fence(
            uuid=path.stem, at=0.0, reason=f"its fence is unreadable: {error}", by="unknown"
        )


logger = logging.getLogger(__name__)
#: Stands in `Fence.cleared_by` if no person cleared the fence.
RECOVERY_CHECK = "recovery check"


def fence_off(folder: DataFolder, device: GpuFacts, reason: str, lost: bool, *, by: str) -> bool:
    """Fence a device until it is known to be well; return whether the fence is durable.

    Args:
        device: As it was last seen.
        lost: Whether it is no longer visible; then only a reboot or a person lifts the fence.
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
        logger.error("GPU %s cannot be fenced; trying again: %s", fence.uuid, error)  # noqa: TRY400
        return False
    return True


def standing_fences(folder: DataFolder, devices: Sequence[GpuFacts]) -> dict[str, str]:
    """Return why devices are fenced, by UUID, after a recovery check of the visible ones.

    A fence comes down as soon as `holds_because` finds no reason to keep it. The check is part of
    every look at the gate, so it needs no process of its own.

    Fails closed: if the fences are unreadable, every device is fenced.
    """
    try:
        fences = read_fences(folder)
    except StorageError as error:
        return dict.fromkeys(
            (device.hardware_uuid for device in devices),
            f"it is unknown whether it is fenced: {error}",
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
    logger.warning("GPU %s has recovered and is no longer fenced: %s", uuid, fenced)
    return None
