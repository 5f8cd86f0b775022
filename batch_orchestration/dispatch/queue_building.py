"""The queue: all waiting files and unfinished batches, in the order of service, with reasons.

It is rebuilt at each tick from durable state: the inbox, claims, plans and store.
`dispatch_sensor` writes it to `queue.json` for all readers; `inbox_sensor` claims files by it.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import msgspec

from batch_orchestration.admission.claims import Claim
from batch_orchestration.admission.inbox import DroppedFile, Inbox
from batch_orchestration.admission.reading.batch_files import is_gzip_name
from batch_orchestration.admission.scans import FileScan, FileScans
from batch_orchestration.admission.sidecars import options_said
from batch_orchestration.core.batches import BatchOptions, BatchPlan
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import Halt, deadline, window_seconds
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.estimates.batch_estimates import expected_seconds
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.decision import decide
from batch_orchestration.queue.demand import Demand
from batch_orchestration.queue.entries import (
    EntryKind,
    EntryState,
    QueueEntry,
    QueueView,
    WaitReason,
)
from batch_orchestration.queue.halts import halts_in_force
from batch_orchestration.queue.load import (
    closed_gate,
    demand_in,
    left_of,
    queue_limits,
    read_load,
    read_rates,
)
from batch_orchestration.queue.ordering import order, whole_points
from batch_orchestration.queue.pause import read_pause
from batch_orchestration.settings import Settings
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


def claim_admissible(
    *, folder: DataFolder, store: Store, inbox: Inbox, settings: Settings, now: float
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
        view = build_queue(
            files, folder=folder, store=store, inbox=inbox, settings=settings, now=now
        )
        waiting.extend(
            entry
            for entry in view.entries
            if entry.kind is EntryKind.FILE and entry.reason not in (None, WaitReason.SETTLING)
        )
        by_name = {inbox.name_of(file.path): file for file in files}
        return [by_name[entry.id] for entry in view.entries if entry.admissible]

    inbox.claim_ready(now=now, choose=choose)
    inbox.forget_gone()
    return waiting


def build_queue(
    files: Iterable[DroppedFile],
    *,
    folder: DataFolder,
    store: Store,
    inbox: Inbox,
    settings: Settings,
    now: float,
    faults: Faults | None = None,
) -> QueueView:
    """Return the current queue, with these files of the inbox.

    Args:
        faults: Collects members that cannot be read completely. They appear in the queue with
            their known data, or not at all if nothing is known.

    Raises:
        StorageError: The store cannot be read.
    """
    faults = Faults() if faults is None else faults
    # A missing store stays missing: `health` and `recover` must see that it is gone.
    records = store.unfinished() if store.exists else []
    entries = list(_entries(files, records, folder=folder, inbox=inbox, now=now, faults=faults))
    served = served_of_late(store, now=now) if entries else {}
    ageing_seconds = settings.priority_ageing_seconds
    paused, limits = read_pause(folder), queue_limits(settings)
    decided = decide(
        order(entries, now=now, ageing_seconds=ageing_seconds, served=served),
        load=read_load(folder, records, limits=limits, faults=faults),
        rates=read_rates(store, settings, now=now),
        limits=limits,
        gate=closed_gate(paused, settings),
        now=now,
    )
    return with_expectations(QueueView(at=now, paused=paused, entries=decided))


def with_expectations(view: QueueView) -> QueueView:
    """Return the queue with the estimated start and end of each entry.

    Entries are assumed to be served one after the other. The start is unknown after an entry
    without an estimate; while the queue is paused, only running entries have one. A paused batch
    delays no other entry.
    """
    at: float | None = view.at
    entries = []
    for entry in view.entries:
        if entry.reason is WaitReason.FAILURE_RATE:
            entries.append(entry)
            continue
        running = entry.state is EntryState.RUNNING
        start = at if view.paused is None or running else None
        seconds = entry.engine_seconds
        end = None if start is None or seconds is None else start + seconds
        entries.append(msgspec.structs.replace(entry, expected_start=start, expected_end=end))
        at = end
    return msgspec.structs.replace(view, entries=tuple(entries))


def _entries(
    files: Iterable[DroppedFile],
    records: Sequence[BatchRecord],
    *,
    folder: DataFolder,
    inbox: Inbox,
    now: float,
    faults: Faults,
) -> Iterator[QueueEntry]:
    """Yield the entry of each batch, claim and file that can be read."""
    halts = halts_in_force(folder, records)
    members: list[tuple[str, Callable[[], QueueEntry]]] = [
        *(
            (r.batch_id, partial(_of_batch, r, folder, now, faults, halts.get(r.batch_id)))
            for r in records
        ),
        *((c.claim_id, partial(_of_claim, c, folder)) for c in inbox.claims(faults)),
        *(
            (name, partial(_of_file, name, file))
            for file in files
            if (name := inbox.name_of(file.path)) and (file.reason is None or file.settling)
        ),
    ]
    for member, read_entry in members:
        with faults.of(member):
            yield read_entry()


def _of_file(name: str, file: DroppedFile) -> QueueEntry:
    entry = _waiting_entry(
        name, file.options(), file.origin.arrived_at, _demand(name, file.stats.st_size, file.scan)
    )
    if not file.settling:
        return entry
    return msgspec.structs.replace(entry, reason=WaitReason.SETTLING, detail=file.reason or "")


def _of_claim(claim: Claim, folder: DataFolder) -> QueueEntry:
    scan, size = None, 0
    with contextlib.suppress(FileNotFoundError):
        stats = claim.path.lstat()
        scan, size = FileScans(folder).find(stats), stats.st_size
    name = f"{claim.origin.folder}/{claim.file_name}".lstrip("/")
    options = options_said(claim.sidecar, claim.origin)
    failing = claim.attempts.failing
    return msgspec.structs.replace(
        _waiting_entry(name, options, claim.origin.arrived_at, _demand(name, size, scan)),
        claimed=True,
        failing=failing,
        detail=str(claim.attempts) if failing else "is being read and admitted",
    )


def _waiting_entry(
    name: str, options: BatchOptions, arrived_at: float, demand: Demand
) -> QueueEntry:
    return QueueEntry(
        kind=EntryKind.FILE,
        id=name,
        source=options.source,
        priority=options.priority,
        arrived_at=arrived_at,
        deadline=arrived_at + window_seconds(options.completion_window),
        state=EntryState.WAITING,
        requests=demand.requests,
        pending=demand.requests,
        tokens=demand.tokens,
        size_bytes=demand.size_bytes,
        new_bytes=demand.new_bytes,
    )


def _demand(name: str, size_bytes: int, scan: FileScan | None) -> Demand:
    """Return the demand of a file; without a scan, only its size is known."""
    is_gzip = is_gzip_name(name)
    if scan is None:
        size = size_bytes * _GZIP_RATIO if is_gzip else size_bytes
        return Demand(requests=None, tokens=None, size_bytes=size, new_bytes=size if is_gzip else 0)
    return Demand(
        requests=scan.requests,
        tokens=scan.tokens,
        size_bytes=scan.size_bytes,
        new_bytes=scan.size_bytes if is_gzip else 0,
    )


def _of_batch(
    record: BatchRecord, folder: DataFolder, now: float, faults: Faults, halt: Halt | None
) -> QueueEntry:
    batch_id = record.batch_id
    plan: BatchPlan | None = None
    until: float | None = None
    # A batch with a damaged plan is shown all the same.
    with faults.of(batch_id):
        plan = folder.read_plan(batch_id)
        until = deadline(plan, folder.resumption(batch_id).read())
    progress = read_progress(folder.progress_path(batch_id))
    running = progress is not None and progress.is_of_a_live_run(now)
    entry = QueueEntry(
        kind=EntryKind.BATCH,
        id=batch_id,
        batch_id=batch_id,
        source=record.source,
        priority=record.options.priority,
        arrived_at=min(record.times.values()),
        deadline=until,
        state=EntryState.RUNNING if running else EntryState.ADMITTED,
        reason=None if halt is None else WaitReason.FAILURE_RATE,
        detail="" if halt is None else halt.reason,
        requests=record.total,
        pending=record.pending,
        settings_hash=record.settings_hash,
    )
    if plan is None:
        return entry
    seconds = expected_seconds(plan, folder=folder, pending=record.pending)
    return msgspec.structs.replace(
        entry,
        arrived_at=plan.arrived_at or plan.created_at,
        tokens=left_of(demand_in(folder, plan), record).tokens,
        engine_seconds=None if seconds is None else seconds.mid,
    )
