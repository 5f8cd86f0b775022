"""What is no batch's: logs, refused files, and what crashes left. Removed by age alone."""

import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from batch_orchestration.core.errors import StorageError
from batch_orchestration.domain.housekeeping import Removal
from batch_orchestration.files.atomic import disk_errors
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.sample_table import prune_samples
from batch_orchestration.services.housekeeping import LEAST_REST_SECONDS, House

#: What `files.atomic.atomic_writer` writes to; a user's file is hardly called so.
_TEMPORARY = re.compile(r"\..{1,40}\.[0-9a-f]{12}\.tmp")
#: The verdict on a claim is repeated to a run of its admission that is started again; by then
#: Dagster's own retries are over many times.
SETTLED_SECONDS = 30 * 86_400.0


def clean_samples(house: House, keep_seconds: float) -> Iterator[Removal]:
    """Remove old samples of batches at rest: rows of `gpu_samples`, and files."""
    pruned = prune_samples(
        *(house.folder, house.store, house.now, keep_seconds),
        ended=house.at_rest,
        dry_run=house.dry_run,
    )
    if pruned.rows:
        yield Removal(subject=f"{pruned.rows:,} rows of gpu_samples")
    if pruned.files:
        yield Removal(subject=f"{pruned.files:,} samples files", size_bytes=pruned.file_bytes)


def clean_logs(house: House, keep_seconds: float) -> Iterator[Removal]:
    """Remove logs of engines and run workers, but those of runs of batches that are not at rest."""
    spared = _runs_not_at_rest(house)
    old = _older(house.folder.logs.rglob("*.log*"), house.now - keep_seconds)
    yield from _removed(
        (path for path in old if not any(path.name.startswith(run) for run in spared)), house
    )


def _runs_not_at_rest(house: House) -> set[str]:
    """Return the runs that have worked on such batches, by the files that each run writes."""
    return {
        path.stem
        for batch_id in house.folder.batch_ids()
        if batch_id not in house.at_rest
        for kind in ("samples", "accounts")
        for path in house.folder.plan_path(batch_id).parent.glob(f"{kind}/*")
    }


def clean_rejected(house: House, keep_seconds: float) -> Iterator[Removal]:
    """Remove files that were refused, and the reasons beside them."""
    old = _older(house.folder.rejected.rglob("*"), house.now - keep_seconds)
    yield from _removed(old, house)


def clean_leftovers(house: House, keep_seconds: float) -> Iterator[Removal]:
    """Remove what crashes left: temporary files, heartbeats of runs that are gone, old verdicts."""
    # A write that goes on, or a run that lives, has changed its file within the hour.
    folder, before = house.folder, house.now - max(keep_seconds, LEAST_REST_SECONDS)
    temporary = (path for path in _ours(house) if _TEMPORARY.fullmatch(path.name))
    yield from _removed(_older(temporary, before), house)
    yield from _removed(_older((folder.root / "heartbeats").glob("*.json"), before), house)
    settled_before = house.now - max(keep_seconds, SETTLED_SECONDS)
    settled = (folder.claims / ".settled").glob("*.json")
    yield from _removed(_older(settled, settled_before), house)


def _ours(house: House) -> Iterator[Path]:
    """Yield what lies where temporary files of ours may: not in the inbox, nor below a claim."""
    folder = house.folder
    yield from folder.root.glob(".*.tmp")
    for own in ("heartbeats", "surveys", "claims/.settled"):
        yield from (folder.root / own).glob(".*.tmp")
    for batch_id in house.at_rest:
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
        # A move leaves the time of the last change as it is, and changes the other.
        changed_at = max(found.st_mtime, found.st_ctime)
        if stat.S_ISREG(found.st_mode) and changed_at < before:
            yield path


def _removed(paths: Iterable[Path], house: House) -> Iterator[Removal]:
    """Remove files; one that cannot be removed does not keep the others, and is told at the end."""
    problem: StorageError | None = None
    for path in list(paths):
        size_bytes = path.lstat().st_size if path.exists() else 0
        try:
            if not house.dry_run:
                with disk_errors(path):
                    path.unlink(missing_ok=True)
        except StorageError as error:
            problem = error
            continue
        yield Removal(subject=_name(path, house.folder), size_bytes=size_bytes)
    if problem is not None:
        raise problem


def _name(path: Path, folder: DataFolder) -> str:
    return str(path.relative_to(folder.root))
