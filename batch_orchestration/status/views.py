"""Views of batches: the records of the store, joined with the progress of their runs."""

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from batch_orchestration.core.batches import ID_HASH_DIGITS, BatchOptions, BatchPlan, BatchStatus
from batch_orchestration.core.errors import BatchNotFound, FileDamaged, StoreLocked
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import FINAL, EarlyEnd, Halt, Resumption, deadline
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.lifecycle.cancellation import delivered
from batch_orchestration.queue.halts import halt_in_force
from batch_orchestration.store.store import Store
from batch_orchestration.workers.progress import STALE_SECONDS, Progress, read_progress


@dataclass(frozen=True, kw_only=True)
class BatchStatusView:
    """One batch at one moment.

    Attributes:
        status: If `store_problem` is set, only a guess from files.
        completed: Answered requests, committed or not; `failed` likewise.
        times: When a status was reached, by status word.
        progress: The last progress file of its run; the batch may be further since.
        progress_age: Age of `progress` in seconds.
        early_end: Why it ends, or ended, early; None if it does not.
        halt: Why it is paused; None if it is not.
        deadline: When its completion window ends.
        store_problem: Why the store could not be read; None if it could.
    """

    plan: BatchPlan
    status: BatchStatus
    completed: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    model: str
    times: dict[str, float]
    output_file: Path | None
    error_file: Path | None
    progress: Progress | None
    progress_age: float | None
    store_problem: str | None
    early_end: EarlyEnd | None = None
    halt: Halt | None = None
    deadline: float = 0.0

    @property
    def batch_id(self) -> str:
        """The batch's id."""
        return self.plan.batch_id

    @property
    def options(self) -> BatchOptions:
        """The options given by its author."""
        return self.plan.options

    @property
    def engine(self) -> str:
        """The kind of engine in its plan."""
        return str(self.plan.settings.get("engine", ""))

    @property
    def total(self) -> int:
        """Number of requests."""
        return self.plan.requests

    @property
    def done(self) -> int:
        """Number of requests with an outcome."""
        return self.completed + self.failed

    @property
    def final(self) -> bool:
        """Whether the batch has ended."""
        return self.status in FINAL

    @property
    def live(self) -> Progress | None:
        """The progress of a run at work; None if there is none or the run is silent."""
        if self.final or self.progress is None or self.progress.resting:
            return None
        return None if self.silent_seconds else self.progress

    @property
    def silent_seconds(self) -> float | None:
        """How long a run that reported no end has been silent; None if it is not silent."""
        if self.final or self.progress is None or self.progress.resting:
            return None
        age = self.progress_age or 0.0
        return age if age > STALE_SECONDS else None


def view_batch(batch_id: str, *, folder: DataFolder, store: Store, now: float) -> BatchStatusView:
    """Return the view of a batch; if the store is locked, from its files alone.

    Raises:
        BatchNotFound: The batch has no plan.
    """
    plan = folder.read_plan(batch_id)
    try:
        view = _from_record(plan, store.batch(batch_id), folder)
    except BatchNotFound:
        # Admission writes the plan first and the record right after.
        view = _from_plan(plan, folder, problem=None, status=BatchStatus.VALIDATING)
    except StoreLocked as locked:
        view = _from_plan(plan, folder, problem=str(locked))
    return with_progress(view, folder=folder, now=now)


def view_batches(*, folder: DataFolder, store: Store, now: float) -> list[BatchStatusView]:
    """Return all batches, newest first.

    Batches with an unreadable plan are left out; `operations.health.damage` reports them.
    """
    plans, faults = {}, Faults()
    for batch_id in folder.batch_ids():
        with faults.of(batch_id):
            plans[batch_id] = folder.read_plan(batch_id)
    problem = None
    try:
        # A folder without batches needs no store, and reading it must not create one.
        records = {record.batch_id: record for record in store.batches()} if plans else {}
    except StoreLocked as locked:
        records, problem = {}, str(locked)
    views = (
        _from_record(plan, records[batch_id], folder)
        if batch_id in records
        else _from_plan(plan, folder, problem=problem)
        for batch_id, plan in plans.items()
    )
    now_views = (with_progress(view, folder=folder, now=now) for view in views)
    return sorted(now_views, key=lambda view: view.plan.created_at, reverse=True)


def with_progress(view: BatchStatusView, *, folder: DataFolder, now: float) -> BatchStatusView:
    """Return the view updated from the progress file alone; the store is not read."""
    if view.final and not view.store_problem:
        return view
    progress = read_progress(folder.progress_path(view.batch_id))
    if progress is None:
        return view
    age = max(0.0, now - progress.updated_at)
    view = replace(view, progress=progress, progress_age=age)
    # A run also counts outcomes in journals; the store may be ahead of a run that is gone.
    if progress.completed + progress.failed <= view.done:
        return view
    return replace(view, completed=progress.completed, failed=progress.failed)


def _from_record(plan: BatchPlan, record: BatchRecord, folder: DataFolder) -> BatchStatusView:
    return replace(
        _from_plan(plan, folder, problem=None, status=record.status),
        completed=record.completed,
        failed=record.failed,
        prompt_tokens=record.prompt_tokens,
        completion_tokens=record.completion_tokens,
        model=record.model,
        times=dict(record.times),
    )


def _from_plan(
    plan: BatchPlan, folder: DataFolder, *, problem: str | None, status: BatchStatus | None = None
) -> BatchStatusView:
    outbox = folder.outbox_path(plan.batch_id)
    output_file = _if_there(outbox / "output.jsonl")
    early_end, resumption = _decisions(plan.batch_id, folder)
    return BatchStatusView(
        plan=plan,
        status=status or _guess(plan.batch_id, early_end, folder),
        completed=0,
        failed=0,
        prompt_tokens=0,
        completion_tokens=0,
        model="",
        times={},
        output_file=output_file,
        error_file=_if_there(outbox / "errors.jsonl"),
        progress=None,
        progress_age=None,
        store_problem=problem,
        early_end=early_end if status is not BatchStatus.COMPLETED else None,
        halt=None if status in FINAL else _halt(plan.batch_id, folder),
        deadline=deadline(plan, resumption),
    )


def _halt(batch_id: str, folder: DataFolder) -> Halt | None:
    with contextlib.suppress(FileDamaged):  # `operations.health.damage` reports it
        return halt_in_force(folder, batch_id)
    return None


def _decisions(batch_id: str, folder: DataFolder) -> tuple[EarlyEnd | None, Resumption | None]:
    """Return the decisions about a batch; `operations.health.damage` reports unreadable ones."""
    early_end, resumption = None, None
    with contextlib.suppress(FileDamaged):
        early_end = folder.early_end(batch_id).read()
    with contextlib.suppress(FileDamaged):
        resumption = folder.resumption(batch_id).read()
    return early_end, resumption


def _guess(batch_id: str, early_end: EarlyEnd | None, folder: DataFolder) -> BatchStatus:
    """Return the status that follows from a batch's files."""
    with contextlib.suppress(FileDamaged):
        if delivered(folder, batch_id):
            return early_end.status if early_end else BatchStatus.COMPLETED
    if early_end is not None and early_end.status is BatchStatus.CANCELLED:
        return BatchStatus.CANCELLING
    return BatchStatus.IN_PROGRESS


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def find_identity(identity: str, *, folder: DataFolder) -> str | None:
    """Return the id of the batch with this identity, from files alone; None if there is none."""
    faults = Faults()  # `operations.health.damage` reports the same
    for name in folder.batch_ids():
        if identity[:ID_HASH_DIGITS] in name:
            with faults.of(name):
                if folder.read_plan(name).identity == identity:
                    return name
    return None
