"""Retention of what belongs to batches: their journals, and their kept inputs.

Once a batch's journals are gone each answer is in the store and in the output, and no longer in a
journal: `recover` cannot make the batch's rows anew, and leaves the batch out. `pruned.json` in the
batch's folder says so; it is there before the first journal goes, so that no run takes a missing
journal for missing answers. Journals that have answers which are too large for the store stay, for
the store names them. Only then may the input go, too; `input-removed.json` says that.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.members import Faults
from batch_orchestration.delivery.assembly import assembly_lock_path
from batch_orchestration.delivery.outbox import OutboxFiles
from batch_orchestration.delivery.recount import recount
from batch_orchestration.domain.housekeeping import Removal
from batch_orchestration.files.atomic import disk_errors, write_atomically
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.plan_checks import input_removed_path
from batch_orchestration.files.sharing import shared_lock
from batch_orchestration.services.housekeeping import House
from batch_orchestration.store.operations import replays_of
from batch_orchestration.workers.reporter import holding

logger = logging.getLogger(__name__)


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """That the journals of a batch were removed, and when (POSIX seconds)."""

    at: float


class InputRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """That a kept input was removed, when (POSIX seconds), and which it was.

    Attributes:
        sha256: Of the file, uncompressed: whoever has a copy can tell that it is the same.
    """

    at: float
    file_name: str
    sha256: str
    size_bytes: int


def clean_journals(house: House, keep_seconds: float) -> Iterator[Removal]:
    """Remove the journals of batches that were completed so long ago.

    Only if the files in the outbox, counted anew, have every request once. Journals of replays
    stay, and those that the store names.
    """
    folder, faults = house.folder, Faults()
    for batch_id in house.completed_before(house.now - keep_seconds):
        with faults.of(batch_id):
            if not (found := _journals(batch_id, folder)):
                continue
            journals = [path for path in found if path not in house.journals_with_answers]
            if not journals and folder.pruned_path(batch_id).exists():
                continue
            removal = Removal(subject=batch_id, size_bytes=_size(journals))
            gone = house.dry_run or _prune(batch_id, journals, folder, now=house.now)
            if gone and journals:
                yield removal
    faults.log()


def _prune(batch_id: str, journals: list[Path], folder: DataFolder, *, now: float) -> bool:
    with holding(shared_lock(assembly_lock_path(batch_id, folder))):
        if not folder.pruned_path(batch_id).exists():
            counted = recount(folder.read_plan(batch_id), OutboxFiles(folder.outbox_path(batch_id)))
            if counted.problem is not None or counted.partial:
                logger.warning("the journals of %s stay: %s", batch_id, counted.problem)
                return False
            write_atomically(folder.pruned_path(batch_id), msgspec.json.encode(Pruned(at=now)))
        _remove(journals)
    logger.info("removed %d journals of %s, delivered long ago", len(journals), batch_id)
    return True


def clean_inputs(house: House, keep_seconds: float) -> Iterator[Removal]:
    """Remove kept inputs of batches that were completed so long ago and have no journals left."""
    before = house.now - keep_seconds
    faults = Faults()
    for batch_id in house.completed_before(before):
        with faults.of(batch_id):
            plan = house.folder.read_plan(batch_id)
            files = _inputs(plan, house.folder)
            if not files or not _needless(batch_id, house.folder):
                continue
            removal = Removal(subject=str(files[0]), size_bytes=_size(files))
            if not house.dry_run:
                _remove_input(plan, files, house)
            yield removal
    faults.log()


def _needless(batch_id: str, folder: DataFolder) -> bool:
    """Whether nothing can read the input any more, but a replay that is not asked for yet."""
    # Somebody may have asked since housekeeping began.
    return not replays_of(batch_id, folder) and folder.pruned_path(batch_id).exists()


def _remove_input(plan: BatchPlan, files: list[Path], house: House) -> None:
    removed = InputRemoved(
        at=house.now, file_name=plan.file_name, sha256=plan.sha256, size_bytes=plan.size_bytes
    )
    write_atomically(input_removed_path(plan, house.folder), msgspec.json.encode(removed))
    _remove(files)
    logger.info("removed the kept input of %s, delivered long ago: %s", plan.batch_id, removed)


def _inputs(plan: BatchPlan, folder: DataFolder) -> list[Path]:
    path = folder.input_path(plan.batch_id)
    return [file for file in (path, path.with_name(f"{path.name}.gz")) if file.exists()]


def _journals(batch_id: str, folder: DataFolder) -> list[Path]:
    return sorted(folder.journal_path(batch_id, 0).parent.glob("*.journal"))


def _remove(files: list[Path]) -> None:
    for file in files:
        with disk_errors(file):
            file.unlink(missing_ok=True)


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)
