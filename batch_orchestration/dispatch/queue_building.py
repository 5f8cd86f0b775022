"""The queue: all waiting files and unfinished batches, in the order of service, with reasons.

It is rebuilt at each tick from durable state: the inbox, claims, plans and store.
`dispatch_sensor` writes it to `queue.json` for all readers; `inbox_sensor` claims files by it.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import msgspec

from batch_orchestration.admission.claims import Claim, FileScan, FileScans
from batch_orchestration.admission.inbox import DroppedFile, Inbox
from batch_orchestration.admission.reading.batch_files import is_gzip_name
from batch_orchestration.admission.sidecars import options_said
from batch_orchestration.core.batches import BatchOptions, BatchPlan
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import Halt, deadline, window_seconds
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.estimates.batch_estimates import expected_seconds
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.capacity import Demand
from batch_orchestration.queue.decision import Decision, Rules, Standing, decide
from batch_orchestration.queue.entries import (
    EntryKind,
    EntryState,
    Pause,
    QueueEntry,
    QueueView,
    WaitReason,
)
from batch_orchestration.queue.files import read_pause
from batch_orchestration.queue.halts import halts_in_force
from batch_orchestration.queue.load import QueueRules, closed_gate, demand_in, left_of, read_load
from batch_orchestration.queue.ordering import Candidate, Place, order, whole_points
from batch_orchestration.queue.submitted import read_rates
from batch_orchestration.store.store import Store
from batch_orchestration.workers.progress import read_progress

#: Fair share counts the tokens of a source in this time: long enough for a chunk or two of a slow
#: engine, short enough that yesterday's use does not count.
SHARE_SECONDS = 3600.0


def in_order_of_service(batches: Iterable[BatchRecord], view: QueueView) -> list[BatchRecord]:
    """Return the batches in the order of the queue; batches outside the queue come last."""
    places = {entry.batch_id: entry.place for entry in view.entries}
    return sorted(
        batches,
        key=lambda batch: (places.get(batch.batch_id, math.inf), batch.batch_id),
    )


def run_priorities(view: QueueView) -> dict[str, int]:
    """Return the run priority of each batch: the whole points of its effective priority."""
    return {
        entry.batch_id: whole_points(entry.effective_priority)
        for entry in view.entries
        if entry.batch_id is not None
    }


def served_of_late(store: Store, *, now: float) -> dict[str, float]:
    """Return the tokens that each source received in the last `SHARE_SECONDS`.

    Raises:
        StorageError: The store cannot be read.
    """
    by_batch = store.tokens_since(now - SHARE_SECONDS)
    served: dict[str, float] = {}
    for batch in store.records(by_batch).values():
        served[batch.source] = served.get(batch.source, 0.0) + by_batch[batch.batch_id]
    return served


#: Typical compression ratio of JSON.
_GZIP_RATIO = 8


class _QueuedItem(NamedTuple):
    """A file, claim or batch, with its arrival, its deadline, and the engine seconds it needs."""

    standing: Standing
    at: float
    deadline: float | None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Queue:
    """The queue at one moment.

    Attributes:
        files: Files that may be claimed now, in the order of service.
    """

    view: QueueView
    files: tuple[DroppedFile, ...]


def read_queue(
    *,
    folder: DataFolder,
    store: Store,
    inbox: Inbox,
    rules: QueueRules,
    now: float,
    faults: Faults | None = None,
) -> Queue:
    """Return the current queue.

    Args:
        faults: Collects members that cannot be read completely. They appear in the queue with
            their known data, or not at all if nothing is known.

    Raises:
        StorageError: The store cannot be read.
    """
    return queue_of(
        inbox.look(now=now),
        folder=folder,
        store=store,
        inbox=inbox,
        rules=rules,
        now=now,
        faults=faults,
    )


def claim_admissible(
    *, folder: DataFolder, store: Store, inbox: Inbox, rules: QueueRules, now: float
) -> list[QueueEntry]:
    """Claim the files for which there is capacity; return the entries of complete files that wait.

    If two ticks run at the same time, one decides and claims, and the other finds nothing left.

    Raises:
        StorageError: The store cannot be read, so the free capacity is unknown.
    """
    waiting: list[QueueEntry] = []

    def choose(files: Sequence[DroppedFile]) -> Sequence[DroppedFile]:
        if all(file.reason for file in files):
            return ()
        queue = queue_of(files, folder=folder, store=store, inbox=inbox, rules=rules, now=now)
        waiting.extend(_waiting_files(queue.view))
        return queue.files

    inbox.claim_ready(now=now, choose=choose)
    inbox.forget_gone()
    return waiting


def queue_of(
    files: Sequence[DroppedFile],
    *,
    folder: DataFolder,
    store: Store,
    inbox: Inbox,
    rules: QueueRules,
    now: float,
    faults: Faults | None = None,
) -> Queue:
    """Return the queue for these files of the inbox; see `read_queue`."""
    records = store.unfinished() if folder.duckdb.exists() else []
    by_name = {inbox.name_of(file.path): file for file in files if _waits(file)}
    paused = read_pause(folder)
    faults = Faults() if faults is None else faults
    halts = halts_in_force(folder, records)
    standings = [
        *_each(
            (
                (r.batch_id, partial(_of_batch, r, folder, now, faults, halts.get(r.batch_id)))
                for r in records
            ),
            faults,
        ),
        *_each(((c.claim_id, partial(_of_claim, c, folder)) for c in inbox.claims(faults)), faults),
        *_each(((name, partial(_of_file, name, f)) for name, f in by_name.items()), faults),
    ]
    decision = decide(
        _in_order(standings, store=store, rules=rules, now=now),
        load=read_load(folder, records, limits=rules.limits, faults=faults),
        rates=read_rates(folder, store, limits=rules.rates, now=now),
        rules=Rules(
            limits=rules.limits,
            gate=closed_gate(paused, rules.device_problem, rules.engine_refusal),
        ),
        now=now,
    )
    return _queue(decision, by_name, paused, now)


def _each(
    members: Iterable[tuple[str, Callable[[], _QueuedItem]]], faults: Faults
) -> Iterator[_QueuedItem]:
    """Yield the item of each member that can be read."""
    for member, arrived in members:
        with faults.of(member):
            yield arrived()


def _waiting_files(view: QueueView) -> Iterator[QueueEntry]:
    for entry in view.entries:
        if entry.kind is EntryKind.FILE and entry.reason not in (None, WaitReason.SETTLING):
            yield entry


def _queue(
    decision: Decision, files: Mapping[str, DroppedFile], paused: Pause | None, now: float
) -> Queue:
    return Queue(
        view=QueueView(at=now, paused=paused, entries=decision.entries),
        files=tuple(files[entry_id] for entry_id in decision.admissible),
    )


def _waits(file: DroppedFile) -> bool:
    return file.reason is None or file.settling


def _in_order(
    arrivals: Sequence[_QueuedItem], *, store: Store, rules: QueueRules, now: float
) -> list[Standing]:
    """Return all in the order of service, with the priority that they gained by waiting."""
    # Numbered, because names may repeat; ties keep the given order.
    candidates = [
        Candidate(
            id=f"{number:06d}",
            source=arrived.standing.entry.source,
            priority=arrived.standing.entry.priority,
            arrived_at=arrived.at,
            deadline=arrived.deadline,
            seconds=arrived.seconds,
            work=arrived.standing.demand.tokens or 0,
        )
        for number, arrived in enumerate(arrivals)
    ]
    served = served_of_late(store, now=now) if candidates else {}
    places = order(candidates, now=now, policy=rules.ordering, served=served)
    return [_placed(arrivals[int(place.candidate.id)].standing, place) for place in places]


def _placed(standing: Standing, place: Place) -> Standing:
    entry = msgspec.structs.replace(
        standing.entry, effective_priority=place.effective_priority, detail=place.why
    )
    return replace(standing, entry=entry)


def _of_file(name: str, file: DroppedFile) -> _QueuedItem:
    demand = _demand(file.path.name, file.stats.st_size, file.scan)
    options = file.options()
    standing = Standing(
        entry=_waiting_entry(name, options, demand),
        demand=demand,
        settling=file.reason if file.settling else None,
    )
    return _of_options(standing, options, file.origin.arrived_at)


def _of_claim(claim: Claim, folder: DataFolder) -> _QueuedItem:
    scan, size = None, 0
    with contextlib.suppress(FileNotFoundError):
        stats = claim.path.lstat()
        scan, size = FileScans(folder).find(stats), stats.st_size
    demand = _demand(claim.path.name, size, scan)
    name = f"{claim.origin.folder}/{claim.file_name}".lstrip("/")
    options = options_said(claim.sidecar, claim.origin)
    standing = Standing(
        entry=_waiting_entry(name, options, demand),
        demand=demand,
        claimed=True,
        failing=str(claim.attempts) if claim.attempts.failing else None,
    )
    return _of_options(standing, options, claim.origin.arrived_at)


def _of_options(standing: Standing, options: BatchOptions, arrived_at: float) -> _QueuedItem:
    wanted = arrived_at + window_seconds(options.completion_window)
    return _QueuedItem(standing, arrived_at, wanted)


def _waiting_entry(name: str, options: BatchOptions, demand: Demand) -> QueueEntry:
    return QueueEntry(
        kind=EntryKind.FILE,
        id=name,
        source=options.source,
        priority=options.priority,
        effective_priority=options.priority,
        state=EntryState.WAITING,
        place=0,
        requests=demand.requests,
        pending=demand.requests,
        tokens=demand.tokens,
    )


def _demand(name: str, size_bytes: int, scan: FileScan | None) -> Demand:
    """Return the demand of a file; without a scan, only its size is known."""
    if scan is None:
        expanded = size_bytes * _GZIP_RATIO if is_gzip_name(name) else size_bytes
        new = expanded if is_gzip_name(name) else 0
        return Demand(requests=None, tokens=None, size_bytes=expanded, new_bytes=new)
    return Demand(
        requests=scan.requests,
        tokens=scan.tokens,
        size_bytes=scan.size_bytes,
        new_bytes=scan.size_bytes if is_gzip_name(name) else 0,
    )


def _of_batch(
    record: BatchRecord, folder: DataFolder, now: float, faults: Faults, halt: Halt | None
) -> _QueuedItem:
    batch_id = record.batch_id
    plan: BatchPlan | None = None
    until: float | None = None
    # A batch with a damaged plan is shown all the same.
    with faults.of(batch_id):
        plan = folder.read_plan(batch_id)
        until = deadline(plan, folder.resumption(batch_id).read())
    tokens = None if plan is None else left_of(demand_in(folder, plan), record).tokens
    running = _is_running(folder, batch_id, now)
    standing = Standing(
        entry=QueueEntry(
            kind=EntryKind.BATCH,
            id=batch_id,
            batch_id=batch_id,
            source=record.source,
            priority=record.options.priority,
            effective_priority=record.options.priority,
            deadline=until,
            state=EntryState.RUNNING if running else EntryState.ADMITTED,
            place=0,
            requests=record.total,
            pending=record.pending,
            tokens=tokens,
            settings_hash=record.settings_hash,
        ),
        demand=Demand(requests=record.pending, tokens=tokens, size_bytes=0),
        halted=None if halt is None else halt.reason,
    )
    arrived_at = min(record.times.values()) if plan is None else plan.arrived_at or plan.created_at
    seconds = None if plan is None else _seconds(plan, folder, record.pending)
    return _QueuedItem(standing, arrived_at, until, seconds)


def _seconds(plan: BatchPlan, folder: DataFolder, pending: int) -> float | None:
    band = expected_seconds(plan, folder=folder, pending=pending)
    return None if band is None else band.mid


def _is_running(folder: DataFolder, batch_id: str, now: float) -> bool:
    progress = read_progress(folder.progress_path(batch_id))
    return progress is not None and progress.is_of_a_live_run(now)
