"""A person pauses the whole queue, and resumes it: one file, which stops admission and new runs."""

from batch_orchestration.core.errors import StorageError
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.queue.capacity import Blocker
from batch_orchestration.queue.entries import Pause, WaitReason


def pause(folder: DataFolder, pause: Pause) -> None:
    """Pause the queue durably; a later pause replaces an earlier one."""
    StateFile(folder.paused, Pause).write(pause)


def unpause(folder: DataFolder) -> Pause | None:
    """Resume the queue; return the pause that ends, None if there was none."""
    before = read_pause(folder)
    StateFile(folder.paused, Pause).remove()
    return before


def read_pause(folder: DataFolder) -> Pause | None:
    """Return the pause; None if the queue is not paused.

    A damaged pause file still counts as a pause, because a person wrote it.
    """
    try:
        return StateFile(folder.paused, Pause).read()
    except StorageError as error:
        return Pause(
            at=0.0, actor="somebody", reason=f"{error}; resume the queue, or pause it again"
        )


def pause_blocker(paused: Pause) -> Blocker:
    """Return the blocker of all entries while the queue is paused."""
    why = f": {paused.reason}" if paused.reason else ""
    return Blocker(WaitReason.PAUSED, f"{paused.actor} paused the queue{why}")
