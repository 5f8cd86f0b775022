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
from batch_orchestration.core.errors import BatchOrchestrationError, HousekeepingBusy
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.atomic import write_atomically
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.housekeeping.settled import settled_batches
from batch_orchestration.store.store import Store
from batch_orchestration.workers.reporter import report_progress


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


class CleanupReport(msgspec.Struct, frozen=True, kw_only=True):
    """The results of housekeeping part by part, with the names of the removed things.

    Attributes:
        removals: By part.
    """

    results: tuple[PartResult, ...] = ()
    removals: dict[str, list[Removal]] = {}


logger = logging.getLogger(__name__)
#: Limit of each part; a tick must not occupy a daemon's slot forever.
PART_SECONDS = 60.0
#: Batches that ended more recently are left alone, whatever the settings: somebody may be looking
#: at them.
LEAST_REST_SECONDS = 3600.0
_BUSY = "housekeeping is at work already; look again in a few minutes"


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
    def at_rest(self) -> dict[str, float]:
        """The settled batches that may be cleaned, and the time since when each is settled."""
        latest = self.now - LEAST_REST_SECONDS
        resting = settled_batches(self.records.values(), self.folder)
        return {batch_id: since for batch_id, since in resting.items() if since <= latest}

    def ended_before(self, moment: float) -> list[str]:
        """Return the batches settled before a moment, the longest first."""
        found = [(since, name) for name, since in self.at_rest.items() if since < moment]
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


def run_cleanup(
    parts: Sequence[Part],
    house: Cleanup,
    *,
    clock: Callable[[], float],
    seconds: float = PART_SECONDS,
    tell: Callable[[str, Removal], None] = lambda part, removal: None,
) -> list[PartResult]:
    """Run the parts one after the other, and save their results unless it is a dry run.

    Args:
        clock: Monotonic seconds.
        seconds: Limit of each part.
        tell: Called with the part's name and each removal, dry or not.

    Raises:
        HousekeepingBusy: Housekeeping is already at work.
    """
    with _alone(house.folder):
        results = [_run(part, house, clock=clock, seconds=seconds, tell=tell) for part in parts]
        if not house.dry_run:
            _keep(results, house.folder)
    return results


def run_cleanup_and_report(
    parts: Sequence[Part],
    house: Cleanup,
    *,
    clock: Callable[[], float],
    seconds: float = PART_SECONDS,
) -> CleanupReport:
    """Run the parts as `run_cleanup` does, and return the names of the removed things, too."""
    removals: dict[str, list[Removal]] = {}

    def tell(part: str, removal: Removal) -> None:
        removals.setdefault(part, []).append(removal)

    results = run_cleanup(parts, house, clock=clock, seconds=seconds, tell=tell)
    return CleanupReport(results=tuple(results), removals=removals)


def results_path(folder: DataFolder) -> Path:
    """Return the path of the file with the last result of each part."""
    return folder.root / "housekeeping.json"


def read_results(folder: DataFolder) -> dict[str, PartResult]:
    """Return the last result of each part, by name.

    Raises:
        StorageError: The file is damaged.
    """
    return StateFile(results_path(folder), dict[str, PartResult]).read() or {}


def _run(
    part: Part,
    house: Cleanup,
    *,
    clock: Callable[[], float],
    seconds: float,
    tell: Callable[[str, Removal], None],
) -> PartResult:
    if part.keep_seconds <= 0:
        return PartResult(part=part.name, at=house.now, off=True)
    if house.doubt is not None and not house.dry_run:
        logger.warning("housekeeping of %s removes nothing: %s", part.name, house.doubt)
        return PartResult(part=part.name, at=house.now, problem=f"not done: {house.doubt}")
    report_progress()
    began, removed, size_bytes, more, problem = clock(), 0, 0, False, None
    try:
        for removal in part.clean(house, part.keep_seconds):
            removed, size_bytes = removed + 1, size_bytes + removal.size_bytes
            tell(part.name, removal)
            report_progress()
            if more := clock() - began > seconds:
                break
    except Exception as error:  # noqa: BLE001 - no failure of a part stops the other parts
        problem = f"{type(error).__name__}: {error}"
        logger.warning("housekeeping of %s: %s", part.name, problem)
    took = clock() - began
    if removed and not house.dry_run:
        logger.info(
            "housekeeping removed %d of %s, %d bytes, in %.1f s",
            *(removed, part.name, size_bytes, took),
        )
    return PartResult(
        part=part.name,
        at=house.now + took,
        seconds=round(took, 3),
        removed=removed,
        size_bytes=size_bytes,
        more=more,
        problem=problem,
    )


@contextlib.contextmanager
def _alone(folder: DataFolder) -> Iterator[None]:
    lock = FileLock(folder.root / "housekeeping.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise HousekeepingBusy(_BUSY) from None
    try:
        yield
    finally:
        lock.release()


def _keep(results: Sequence[PartResult], folder: DataFolder) -> None:
    try:
        known = read_results(folder)
    except BatchOrchestrationError:  # old results are not worth a failure
        known = {}
    known |= {result.part: result for result in results}
    write_atomically(results_path(folder), msgspec.json.encode(known))
