"""Registration of a batch: its id, the journals of its faulty lines, its row in the store.

A batch exists as soon as its folder does; everything here can be repeated.
"""

import contextlib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import filelock

from batch_orchestration.core.batches import ID_HASH_DIGITS, BatchPlan, batch_id
from batch_orchestration.core.errors import StorageError
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.requests import Fault
from batch_orchestration.core.results import Provenance
from batch_orchestration.files.atomic import sync_folder
from batch_orchestration.files.data_folder import DataFolder, journal_name
from batch_orchestration.files.journal import Journal
from batch_orchestration.files.sharing import share, shared_lock
from batch_orchestration.files.unfinished import marked
from batch_orchestration.store.operations import Operations
from batch_orchestration.store.store import Store

#: Run id in the journals that admission writes.
ADMISSION_RUN_ID = "admission"
_STAGED_JOURNALS = "journals"
#: Of a tick's 60 s; an admission holds the lock only while it writes the plan.
_LOCK_TIMEOUT_SECONDS = 10.0


def admission_lock(folder: DataFolder) -> filelock.BaseFileLock:
    """Return the lock under which batches are created, one after the other."""
    return shared_lock(folder.claims / ".admission.lock")


def free_batch_id(folder: DataFolder, file_name: str, identity: str) -> str:
    """Return the id of a new batch; longer than usual if another batch has the short one."""
    for digits in range(ID_HASH_DIGITS, len(identity) + 1):
        candidate = batch_id(file_name, identity, digits=digits)
        places = (
            folder.plan_path(candidate).parent,
            folder.journal_path(candidate, 0).parent,
            folder.outbox_path(candidate),
        )
        if not any(place.exists() for place in places):
            return candidate
    raise StorageError(f"every id for {file_name} is taken, the longest is {candidate}")


def write_fault_journals(
    work: Path, plan: BatchPlan, faults: Iterable[Fault], *, at: float
) -> None:
    """Write the outcomes of faulty lines to journals beside the plan: runs do not send them.

    Args:
        work: The folder that will become the batch's.
        faults: In file order.
    """
    provenance = Provenance(run_id=ADMISSION_RUN_ID, settings_hash=plan.settings_hash)
    size = plan.requests_per_chunk
    for number, of_chunk in itertools.groupby(faults, key=lambda fault: fault.index // size):
        path = work / _STAGED_JOURNALS / journal_name(number)
        with Journal.open(
            path, batch_id=plan.batch_id, number=number, provenance=provenance, at=at
        ) as journal:
            for fault in of_chunk:
                journal.record_outcome(fault, fault.as_failure(), 0, at)
            journal.sync()


def register_batch(folder: DataFolder, store: Store, batch_id: str, *, at: float) -> None:
    """Move the journals of a planned batch into place and add the batch to the store."""
    plan = folder.read_plan(batch_id)
    staged = folder.plan_path(batch_id).parent / _STAGED_JOURNALS
    if staged.exists():
        staged.rename(folder.journal_path(batch_id, 0).parent)
        sync_folder(folder.journals)
    share(folder.plan_path(batch_id).parent)
    Operations(folder, batch_id).make_folder()
    store.add_batch(plan, at=at)


def register_missing(
    folder: DataFolder, store: Store, *, at: float, faults: Faults | None = None
) -> list[str]:
    """Add planned batches that a crash kept out of the store, and return their ids.

    This also refills a store that was lost. Call it under `admission_lock`.

    Args:
        faults: Collects batches that cannot be added; without it they are logged.
    """
    found = Faults() if faults is None else faults
    registered = []
    for planned in unregistered(folder, store):
        with found.of(planned):
            register_batch(folder, store, planned, at=at)
            registered.append(planned)
    if faults is None:
        found.log()
    return registered


def register_lost(
    folder: DataFolder, store: Store, *, at: float, faults: Faults | None = None
) -> None:
    """Call `register_missing` at a tick, under `admission_lock`, if any batch is missing.

    Raises:
        StorageError: The store cannot be read or written.
    """
    with contextlib.suppress(filelock.Timeout):  # the next tick tries again
        if unregistered(folder, store):
            with admission_lock(folder).acquire(timeout=_LOCK_TIMEOUT_SECONDS):
                register_missing(folder, store, at=at, faults=faults)


def unregistered(folder: DataFolder, store: Store) -> list[str]:
    """Return the planned batches of the index that are not in the store.

    If the store is empty, return every planned batch on the disk, in the index or not.
    """
    names = folder.batch_ids() if store.is_empty() else marked(folder)
    known = store.records(names)
    return [name for name in names if name not in known and is_planned(name, folder)]


def is_planned(batch_id: str, folder: DataFolder) -> bool:
    """Whether a batch has a plan and was not pruned."""
    # A pruned batch has no journals: its requests would be sent again, though it was delivered.
    pruned = os.path.lexists(folder.pruned_path(batch_id))
    return os.path.lexists(folder.plan_path(batch_id)) and not pruned
