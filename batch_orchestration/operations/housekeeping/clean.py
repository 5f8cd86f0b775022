"""Housekeeping: removes old data, part by part; a part that fails does not stop the next.

A part is a generator. It yields each thing right after removing it, or, in a dry run, without
removing it. The caller can therefore stop at any time; the rest is removed the next time.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import HousekeepingBusy, StorageError
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import FINAL, RESUMABLE
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.store.operations import last_operation_at, replays_of
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import report_progress

logger = logging.getLogger(__name__)
#: Limit of each part; a tick must not occupy a daemon's slot forever.
PART_SECONDS = 60.0
#: Batches that ended more recently are left alone, whatever the settings: somebody may be reading
#: them.
LEAST_REST_SECONDS = 3600.0


class Removal(msgspec.Struct, frozen=True, kw_only=True):
    """One removed thing, or one that would be removed: a batch's journals, a file, a run.

    Attributes:
        subject: Its name, for people.
        size_bytes: On the disk; 0 if unknown.
    """

    subject: str
    size_bytes: int = 0


class PartResult(msgspec.Struct, frozen=True, kw_only=True):
    """The last result of one part of housekeeping.

    Attributes:
        at: When it ended.
        seconds: Its duration.
        removed: Number of removed things.
        size_bytes: Of the removed things.
        off: Whether the settings turn it off.
        more: Whether its time ran out before it was done; it goes on the next time.
        problem: Why it ended early; None if it did not.
    """

    part: str
    at: float
    seconds: float = 0.0
    removed: int = 0
    size_bytes: int = 0
    off: bool = False
    more: bool = False
    problem: str | None = None

    @property
    def note(self) -> str:
        """A remark beside the numbers; usually empty."""
        if self.off:
            return "off"
        return self.problem or ("goes on the next time" if self.more else "")


class CleanupReport(msgspec.Struct, frozen=True, kw_only=True):
    """The results of housekeeping part by part.

    Attributes:
        removals: Removed things by part; parts that removed nothing are left out.
    """

    results: tuple[PartResult, ...] = ()
    removals: dict[str, list[Removal]] = {}


def batches_to_retire(
    keys: Mapping[str, int],
    ended: Mapping[str, float],
    *,
    before: float | None,
    most: int | None,
) -> list[str]:
    """Return the batches whose keys leave Dagster's key space, the longest ended first.

    Args:
        keys: Number of keys of each batch.
        ended: When each batch that may go at all ended.
        before: Batches that ended earlier go in any case; None: none does.
        most: If there are more keys in all, further batches go, whatever their age, until a tenth
            of this number is free again; None: no bound.
    """
    total = sum(keys.values())
    aim = total if most is None or total <= most else most - most // 10
    retired = []
    for batch_id in sorted(ended.keys() & keys.keys(), key=lambda name: (ended[name], name)):
        if total <= aim and (before is None or ended[batch_id] >= before):
            break
        retired.append(batch_id)
        total -= keys[batch_id]
    return retired


@dataclass(frozen=True)
class Cleanup:
    """The inputs of housekeeping, as of its beginning.

    Attributes:
        dry_run: Only list the removals.
        doubt: Why the clock is in doubt, so that nothing is removed; None if it is trusted.
    """

    folder: DataFolder
    store: Store
    now: float
    dry_run: bool = False
    doubt: str | None = None

    @cached_property
    def records(self) -> dict[str, BatchRecord]:
        """All batches of the store, by id."""
        return {record.batch_id: record for record in self.store.batches()}

    @cached_property
    def journals_with_answers(self) -> set[Path]:
        """The journals with answers that are not in the store."""
        return self.store.journals_with_answers()

    @cached_property
    def settled(self) -> dict[str, float]:
        """The settled batches that may be cleaned, and the time since when each is settled.

        A settled batch was delivered, has no open replay and was not resumed since: it does not
        change unless a person acts. A batch whose files cannot be read is not settled.
        """
        latest, faults = self.now - LEAST_REST_SECONDS, Faults()
        found: dict[str, float] = {}
        for batch_id, record in self.records.items():
            with faults.of(batch_id):
                since = _settled_since(record, self.folder)
                found |= {} if since is None or since > latest else {batch_id: since}
        faults.log()
        return found

    def ended_before(self, moment: float) -> list[str]:
        """Return the batches settled before a moment, the longest first."""
        found = [(since, name) for name, since in self.settled.items() if since < moment]
        return [name for _, name in sorted(found)]

    def completed_before(self, moment: float) -> list[str]:
        """Return the batches completed before a moment, which cannot be resumed."""
        completed = BatchStatus.COMPLETED
        return [n for n in self.ended_before(moment) if self.records[n].status is completed]


#: Takes the cleanup and the greatest age in seconds.
Cleaner = Callable[[Cleanup, float], Iterator[Removal]]


@dataclass(frozen=True)
class Part:
    """One kind of data that is removed by age.

    Attributes:
        keep_seconds: The greatest age; 0 keeps the data forever.
    """

    name: str
    keep_seconds: float
    clean: Cleaner


def _settled_since(record: BatchRecord, folder: DataFolder) -> float | None:
    ended_at = record.times.get(record.status)
    if ended_at is None or record.status not in FINAL or replays_of(record.batch_id, folder):
        return None
    resumption = folder.resumption(record.batch_id).read()
    if record.status in RESUMABLE and resumption is not None and resumption.at > ended_at:
        return None
    return max(ended_at, last_operation_at(folder, record.batch_id))


def run_cleanup(
    parts: Sequence[Part],
    cleanup: Cleanup,
    *,
    clock: Callable[[], float],
    seconds: float = PART_SECONDS,
) -> CleanupReport:
    """Run the parts one after the other, and save their results unless it is a dry run.

    Args:
        clock: Monotonic seconds.
        seconds: Limit of each part.

    Raises:
        HousekeepingBusy: Housekeeping is already at work.
    """
    with _alone(cleanup.folder):
        done = [_run(part, cleanup, clock=clock, seconds=seconds) for part in parts]
        results = tuple(result for result, _ in done)
        if not cleanup.dry_run:
            _save(results, cleanup.folder)
    removals = {result.part: removed for result, removed in done if removed}
    return CleanupReport(results=results, removals=removals)


def results_file(folder: DataFolder) -> StateFile[dict[str, PartResult]]:
    """Return the file with the last result of each part, by name."""
    return StateFile(folder.root / "housekeeping.json", dict[str, PartResult])


def _run(
    part: Part, cleanup: Cleanup, *, clock: Callable[[], float], seconds: float
) -> tuple[PartResult, list[Removal]]:
    if part.keep_seconds <= 0:
        return PartResult(part=part.name, at=cleanup.now, off=True), []
    if cleanup.doubt is not None and not cleanup.dry_run:
        logger.warning("housekeeping of %s removes nothing: %s", part.name, cleanup.doubt)
        not_done = f"not done: {cleanup.doubt}"
        return PartResult(part=part.name, at=cleanup.now, problem=not_done), []
    report_progress()
    removed: list[Removal] = []
    problem: str | None = None
    began, more = clock(), False
    try:
        for removal in part.clean(cleanup, part.keep_seconds):
            removed.append(removal)
            report_progress()
            if more := clock() - began > seconds:
                break
    except Exception as error:  # noqa: BLE001 - no failure of a part stops the other parts
        problem = f"{type(error).__name__}: {error}"
        logger.warning("housekeeping of %s: %s", part.name, problem)
    took = clock() - began
    result = PartResult(
        part=part.name,
        at=cleanup.now + took,
        seconds=round(took, 3),
        removed=len(removed),
        size_bytes=sum(removal.size_bytes for removal in removed),
        more=more,
        problem=problem,
    )
    if removed and not cleanup.dry_run:
        logger.info("housekeeping removed %s", result)
    return result, removed


@contextlib.contextmanager
def _alone(folder: DataFolder) -> Iterator[None]:
    lock = FileLock(folder.root / "housekeeping.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise HousekeepingBusy("housekeeping is running; try again in a few minutes") from None
    try:
        yield
    finally:
        lock.release()


def _save(results: Sequence[PartResult], folder: DataFolder) -> None:
    known: Mapping[str, PartResult] = {}
    with contextlib.suppress(StorageError):  # Old results are not worth a failure.
        known = results_file(folder).read() or {}
    results_file(folder).write({**known} | {result.part: result for result in results})
