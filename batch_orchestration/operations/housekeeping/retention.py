"""Retention: one function for each kind of data that is removed by age, and the table of them.

Once a batch's journals are gone, its answers are only in the store and in the output: `recover`
cannot rebuild the batch's rows, and leaves the batch out. `pruned.json` in the batch's folder
records that. It is written before the first journal is removed, so that no run takes a missing
journal for missing answers. Journals with answers that are too large for the store stay, because
the store refers to them. The input may be removed only after the journals; `input-removed.json`
records that.
"""

import logging
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.delivery.assembly import delivery_lock_path
from batch_orchestration.delivery.outbox import OutboxFiles
from batch_orchestration.delivery.recount import recount
from batch_orchestration.files.atomic import disk_errors
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.kept_input import input_removed_path
from batch_orchestration.files.sharing import shared_lock
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.gpu.sample_table import prune_samples
from batch_orchestration.operations.housekeeping.clean import (
    LEAST_REST_SECONDS,
    Cleaner,
    Cleanup,
    Part,
    Removal,
)
from batch_orchestration.settings import Settings
from batch_orchestration.store.operations import replays_of
from batch_orchestration.workers.reporter import holding

logger = logging.getLogger(__name__)
SECONDS_PER_DAY = 86_400.0
#: Temporary names of `files.atomic.atomic_writer`; a user's file hardly has such a name.
_TEMPORARY = re.compile(r"\..{1,40}\.[0-9a-f]{12}\.tmp")
#: A restarted admission run reads the claim's admission result again; by this age Dagster's own
#: retries are long over.
SETTLED_SECONDS = 30 * SECONDS_PER_DAY


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """Records that the journals of a batch were removed, and when."""

    at: float


class InputRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """Records that a kept input was removed, and when, and identifies it.

    Attributes:
        sha256: Of the uncompressed file; it identifies other copies.
    """

    at: float
    file_name: str
    sha256: str
    size_bytes: int


def clean_journals(cleanup: Cleanup, keep_seconds: float) -> Iterator[Removal]:
    """Remove the journals of batches that were completed longer ago than that.

    A recount of the files in the outbox must find every request once. Journals of replays stay, and
    so do journals that the store refers to.
    """
    folder, faults = cleanup.folder, Faults()
    for batch_id in cleanup.completed_before(cleanup.now - keep_seconds):
        with faults.of(batch_id):
            if not (found := _journals(batch_id, folder)):
                continue
            journals = [path for path in found if path not in cleanup.journals_with_answers]
            if not journals and folder.pruned_path(batch_id).exists():
                continue
            removal = Removal(subject=batch_id, size_bytes=_size(journals))
            gone = cleanup.dry_run or _prune(batch_id, journals, folder, now=cleanup.now)
            if gone and journals:
                yield removal
    faults.log()


def _prune(batch_id: str, journals: list[Path], folder: DataFolder, *, now: float) -> bool:
    with holding(shared_lock(delivery_lock_path(batch_id, folder))):
        if not folder.pruned_path(batch_id).exists():
            files = OutboxFiles.present(folder.outbox_path(batch_id))
            counted = recount(folder.read_plan(batch_id), files)
            if counted.problem is not None or counted.partial:
                logger.warning("the journals of %s stay: %s", batch_id, counted.problem)
                return False
            StateFile(folder.pruned_path(batch_id), Pruned).write(Pruned(at=now))
        _remove(journals)
    logger.info("removed %d journals of %s, delivered long ago", len(journals), batch_id)
    return True


def clean_inputs(cleanup: Cleanup, keep_seconds: float) -> Iterator[Removal]:
    """Remove kept inputs of batches that were completed that long ago and have no journals left."""
    faults = Faults()
    for batch_id in cleanup.completed_before(cleanup.now - keep_seconds):
        with faults.of(batch_id):
            plan = cleanup.folder.read_plan(batch_id)
            files = _inputs(plan, cleanup.folder)
            if not files or not _needless(batch_id, cleanup.folder):
                continue
            removal = Removal(subject=str(files[0]), size_bytes=_size(files))
            if not cleanup.dry_run:
                _remove_input(plan, files, cleanup)
            yield removal
    faults.log()


def _needless(batch_id: str, folder: DataFolder) -> bool:
    """Whether nothing can read the input any more, except a replay that is not requested yet."""
    # A replay may have been requested since housekeeping began.
    return not replays_of(batch_id, folder) and folder.pruned_path(batch_id).exists()


def _remove_input(plan: BatchPlan, files: list[Path], cleanup: Cleanup) -> None:
    removed = InputRemoved(
        at=cleanup.now, file_name=plan.file_name, sha256=plan.sha256, size_bytes=plan.size_bytes
    )
    StateFile(input_removed_path(plan, cleanup.folder), InputRemoved).write(removed)
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


def clean_samples(cleanup: Cleanup, keep_seconds: float) -> Iterator[Removal]:
    """Remove old samples of settled batches: rows of `gpu_samples`, and files."""
    pruned = prune_samples(
        *(cleanup.folder, cleanup.store, cleanup.now, keep_seconds),
        ended=cleanup.settled,
        dry_run=cleanup.dry_run,
    )
    if pruned.rows:
        yield Removal(subject=f"{pruned.rows:,} rows of gpu_samples")
    if pruned.files:
        yield Removal(subject=f"{pruned.files:,} samples files", size_bytes=pruned.file_bytes)


def clean_logs(cleanup: Cleanup, keep_seconds: float) -> Iterator[Removal]:
    """Remove old logs of engines and run workers, except of runs whose batch is not settled."""
    spared = _runs_of_unsettled_batches(cleanup)
    old = _older(cleanup.folder.logs.rglob("*.log*"), cleanup.now - keep_seconds)
    yield from _removed(
        (path for path in old if not any(path.name.startswith(run) for run in spared)), cleanup
    )


def _runs_of_unsettled_batches(cleanup: Cleanup) -> set[str]:
    """Return the runs that have worked on unsettled batches, by the files that each run writes."""
    return {
        path.stem
        for batch_id in cleanup.folder.batch_ids()
        if batch_id not in cleanup.settled
        for kind in ("samples", "accounts")
        for path in cleanup.folder.plan_path(batch_id).parent.glob(f"{kind}/*")
    }


def clean_rejected(cleanup: Cleanup, keep_seconds: float) -> Iterator[Removal]:
    """Remove rejected files, and the reasons beside them."""
    old = _older(cleanup.folder.rejected.rglob("*"), cleanup.now - keep_seconds)
    yield from _removed(old, cleanup)


def clean_stale_files(cleanup: Cleanup, keep_seconds: float) -> Iterator[Removal]:
    """Remove temporary files, heartbeats of dead runs, and old admission results."""
    # A write in progress and a live run have changed their file within the hour.
    folder, before = cleanup.folder, cleanup.now - max(keep_seconds, LEAST_REST_SECONDS)
    temporary = (path for path in _ours(cleanup) if _TEMPORARY.fullmatch(path.name))
    yield from _removed(_older(temporary, before), cleanup)
    yield from _removed(_older((folder.root / "heartbeats").glob("*.json"), before), cleanup)
    settled_before = cleanup.now - max(keep_seconds, SETTLED_SECONDS)
    settled = (folder.claims / ".settled").glob("*.json")
    yield from _removed(_older(settled, settled_before), cleanup)


def _ours(cleanup: Cleanup) -> Iterator[Path]:
    """Yield our possible temporary files: none in the inbox, none below a claim."""
    folder = cleanup.folder
    yield from folder.root.glob(".*.tmp")
    for own in ("heartbeats", "scans", "claims/.settled"):
        yield from (folder.root / own).glob(".*.tmp")
    for batch_id in cleanup.settled:
        for place in (
            folder.plan_path(batch_id).parent,
            folder.outbox_path(batch_id),
            folder.journal_path(batch_id, 0).parent,
        ):
            yield from place.rglob(".*.tmp")


def _older(paths: Iterable[Path], before: float) -> Iterator[Path]:
    for path in paths:
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        # A move keeps the modification time and changes the other.
        changed_at = max(found.st_mtime, found.st_ctime)
        if stat.S_ISREG(found.st_mode) and changed_at < before:
            yield path


def _removed(paths: Iterable[Path], cleanup: Cleanup) -> Iterator[Removal]:
    """Remove files; a failure does not stop the others, and is raised at the end."""
    problem: StorageError | None = None
    for path in list(paths):
        size_bytes = path.lstat().st_size if path.exists() else 0
        try:
            if not cleanup.dry_run:
                with disk_errors(path):
                    path.unlink(missing_ok=True)
        except StorageError as error:
            problem = error
            continue
        yield Removal(subject=str(path.relative_to(cleanup.folder.root)), size_bytes=size_bytes)
    if problem is not None:
        raise problem


def cleanup_parts(settings: Settings) -> list[Part]:
    """Return the parts of housekeeping for the data folder, in their order."""
    days: list[tuple[str, float, Cleaner]] = [
        ("journals", settings.journal_retention_days, clean_journals),
        ("samples", settings.sample_retention_days, clean_samples),
        ("inputs", settings.input_retention_days, clean_inputs),
        ("rejected", settings.rejected_retention_days, clean_rejected),
        ("logs", settings.log_retention_days, clean_logs),
        ("stale-files", settings.stale_file_retention_days, clean_stale_files),
    ]
    return [Part(name, SECONDS_PER_DAY * kept, clean) for name, kept, clean in days]
