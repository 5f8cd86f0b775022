"""Views of batches: the records of the store, joined with the progress of their runs."""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from batch_orchestration.core.batches import ID_HASH_DIGITS, BatchOptions, BatchPlan, BatchStatus
from batch_orchestration.core.errors import FileDamaged, StoreLocked
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import FINAL, EarlyEnd, Halt, deadline
from batch_orchestration.core.results import BatchRecord
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.lifecycle.cancellation import delivered
from batch_orchestration.queue.halts import halt_in_force
from batch_orchestration.store.store import Store
from batch_orchestration.workers.progress import STALE_SECONDS, Progress, read_progress


@dataclass(frozen=True, kw_only=True)
class BatchStatusView:
    """One batch at one moment: its plan, its record in the store and the progress of its run.

    Attributes:
        record: None if the store does not have the batch yet, or cannot be read.
        status: Status of the record; without a record, the status that follows from files.
        early_end: Why it ends, or ended, early; None if it does not.
        halt: Why it is paused; None if it is not.
        deadline: When its completion window ends.
        store_problem: Why the store could not be read; None if it could.
        progress: The last progress file of its run; the batch may be further since.
        progress_age: Age of `progress` in seconds.
    """

    plan: BatchPlan
    record: BatchRecord | None
    status: BatchStatus
    output_file: Path | None
    error_file: Path | None
    early_end: EarlyEnd | None
    halt: Halt | None
    deadline: float
    store_problem: str | None
    progress: Progress | None = None
    progress_age: float | None = None

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
    def completed(self) -> int:
        """Number of answered requests, committed or not."""
        return self._counts.completed if self._counts else 0

    @property
    def failed(self) -> int:
        """Number of failed requests, committed or not."""
        return self._counts.failed if self._counts else 0

    @property
    def done(self) -> int:
        """Number of requests with an outcome."""
        return self.completed + self.failed

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens of the committed chunks."""
        record = self.record
        return (record.prompt_tokens, record.completion_tokens) if record else (0, 0)

    @property
    def model(self) -> str:
        """The model that answers; empty if it is unknown."""
        return self.record.model if self.record else ""

    @property
    def times(self) -> Mapping[str, float]:
        """When each status was reached, by status word."""
        return self.record.times if self.record else {}

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

    @property
    def _counts(self) -> BatchRecord | Progress | None:
        """The larger counts: a run counts outcomes in journals, and the store outlives the run."""
        known = [each for each in (self.record, self.progress) if each is not None]
        return max(known, key=lambda each: each.completed + each.failed, default=None)


def view_batch(batch_id: str, *, folder: DataFolder, store: Store, now: float) -> BatchStatusView:
    """Return the view of a batch; if the store is locked, from its files alone.

    Raises:
        BatchNotFound: The batch has no plan.
    """
    plan = folder.read_plan(batch_id)
    record, problem = None, None
    try:
        record = store.records([batch_id]).get(batch_id)
    except StoreLocked as locked:
        problem = str(locked)
    return _view(plan, record, folder, problem=problem, now=now)


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
        _view(plan, records.get(batch_id), folder, problem=problem, now=now)
        for batch_id, plan in plans.items()
    )
    return sorted(views, key=lambda view: view.plan.created_at, reverse=True)


def with_progress(view: BatchStatusView, *, folder: DataFolder, now: float) -> BatchStatusView:
    """Return the view updated from the progress file alone; the store is not read."""
    if view.final and not view.store_problem:
        return view
    progress = read_progress(folder.progress_path(view.batch_id))
    age = None if progress is None else max(0.0, now - progress.updated_at)
    return replace(view, progress=progress, progress_age=age)


def _view(
    plan: BatchPlan,
    record: BatchRecord | None,
    folder: DataFolder,
    *,
    problem: str | None,
    now: float,
) -> BatchStatusView:
    """Return a view; `operations.health.damage` reports the decisions that cannot be read."""
    batch_id, outbox = plan.batch_id, folder.outbox_path(plan.batch_id)
    early_end = folder.early_end(batch_id).read_if_sound()
    if record is not None:
        status = record.status
    elif problem is None:
        # Admission writes the plan first and the record right after.
        status = BatchStatus.VALIDATING
    else:
        status = _status_by_files(batch_id, early_end, folder)
    halt = None
    if status not in FINAL:
        with contextlib.suppress(FileDamaged):
            halt = halt_in_force(folder, batch_id)
    view = BatchStatusView(
        plan=plan,
        record=record,
        status=status,
        output_file=_if_present(outbox / "output.jsonl"),
        error_file=_if_present(outbox / "errors.jsonl"),
        early_end=None if status is BatchStatus.COMPLETED else early_end,
        halt=halt,
        deadline=deadline(plan, folder.resumption(batch_id).read_if_sound()),
        store_problem=problem,
    )
    return with_progress(view, folder=folder, now=now)


def _status_by_files(batch_id: str, early_end: EarlyEnd | None, folder: DataFolder) -> BatchStatus:
    with contextlib.suppress(FileDamaged):
        if delivered(folder, batch_id):
            return early_end.status if early_end else BatchStatus.COMPLETED
    if early_end is not None and early_end.status is BatchStatus.CANCELLED:
        return BatchStatus.CANCELLING
    return BatchStatus.IN_PROGRESS


def _if_present(path: Path) -> Path | None:
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
