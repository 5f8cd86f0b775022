"""Fences: a file per device that is not to be used, there until a person or a check removes it."""

from pathlib import Path

import msgspec

from batch_orchestration.core.errors import StorageError
from batch_orchestration.domain.gpu_faults import ClearedFence, Fence
from batch_orchestration.files.atomic import disk_errors, read_kept, sync_folder, write_atomically
from batch_orchestration.files.data_folder import DataFolder


def fence_path(folder: DataFolder, uuid: str) -> Path:
    """Where the fence of a device is kept; that it exists is the decision."""
    return folder.fences / f"{uuid.replace('/', '_')}.json"


def put_up_fence(folder: DataFolder, fence: Fence) -> bool:
    """Keep a fence, durably, and return True; one that stands already is left as it is.

    Raises:
        StorageError: It cannot be written.
    """
    path = fence_path(folder, fence.uuid)
    if path.exists():
        return False
    write_atomically(path, msgspec.json.format(msgspec.json.encode(fence)) + b"\n")
    return True


def read_fences(folder: DataFolder) -> dict[str, Fence]:
    """Return the fences by the uuid of the device. One that cannot be read is a fence all the same.

    Raises:
        StorageError: Nobody can tell whether there are any.
    """
    try:
        paths = [path for path in folder.fences.iterdir() if path.suffix == ".json"]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"cannot read {folder.fences}: {error.strerror or error}") from error
    return {path.stem: fence for path in sorted(paths) if (fence := _read(path)) is not None}


def clear_fence(folder: DataFolder, uuid: str, *, at: float, by: str) -> Fence | None:
    """Remove the fence of a device, and keep who did it; None if there is none.

    Raises:
        StorageError: It cannot be done; the fence stands.
    """
    path = fence_path(folder, uuid)
    fence = _read(path)
    if fence is None:
        return None
    record = ClearedFence(fence=fence, at=at, by=by)
    kept = folder.fences / "cleared" / f"{path.stem}-{at:.3f}.json"
    write_atomically(kept, msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    with disk_errors(path):
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    return fence


def cleared_fences(folder: DataFolder) -> list[ClearedFence]:
    """Return the fences that were cleared, oldest first; what cannot be read is left out."""
    found = []
    for path in (folder.fences / "cleared").glob("*.json"):
        try:
            record = read_kept(path, ClearedFence)
        except StorageError:
            continue
        if record is not None:
            found.append(record)
    return sorted(found, key=lambda record: record.at)


def _read(path: Path) -> Fence | None:
    try:
        return read_kept(path, Fence)
    except StorageError as error:
        return Fence(uuid=path.stem, at=0.0, reason=f"its fence says nothing: {error}", by="nobody")
