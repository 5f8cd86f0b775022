"""Recovery: rebuilds the store from plans, journals and people's decisions.

For a batch that ended early, it also reads the kept input, the only source of the unanswered lines.
All of these are kept for as long as their batch, so no commit is lost with the DuckDB file. Three
facts are in the store alone: when and by which run chunks were committed (rebuilt as their last
outcome), the memory level of the engine (rebuilt as unknown), and when the batch reached its status
(rebuilt from its files).
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from batch_orchestration.admission.registration import admission_lock, register_batch
from batch_orchestration.core.batches import BatchStatus
from batch_orchestration.core.errors import (
    FileDamaged,
    PlanMismatch,
    StorageError,
    StoreLocked,
    StoreOfOtherVersion,
)
from batch_orchestration.core.fault_isolation import Faults
from batch_orchestration.core.lifecycle import EarlyEnd
from batch_orchestration.delivery.assembly import assemble
from batch_orchestration.delivery.outbox import OutboxFiles
from batch_orchestration.delivery.recount import recount
from batch_orchestration.files.atomic import disk_errors, make_folder, sync_folder
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.journal import read_journal
from batch_orchestration.files.journal_reading import replay_journal
from batch_orchestration.files.kept_input import ChunkRef, busy_seconds, settled_requests
from batch_orchestration.files.moving import move_into
from batch_orchestration.gpu.sample_table import SampleTaker
from batch_orchestration.lifecycle.cancellation import delivered
from batch_orchestration.lifecycle.close_out import commit_ended
from batch_orchestration.store.connection import DEADLINE_SECONDS, replacing
from batch_orchestration.store.operations import Operations
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)
#: Takes the place of a run's id in a batch's history.
ACTOR = "recovery"


def remake(
    path: Path,
    fill: Callable[[Store], None],
    *,
    at: float,
    deadline_seconds: float = DEADLINE_SECONDS,
) -> Path | None:
    """Create a store, let `fill` fill it, and put it in place; return the old file's new path.

    An old file is renamed and never deleted. All our writers wait meanwhile. If `fill` raises,
    nothing is changed.

    Raises:
        StoreLocked: Others were writing past the deadline.
        StorageError: The folder cannot be written.
    """
    with disk_errors(path):
        make_folder(path.parent)
    with (
        replacing(path, deadline_seconds=deadline_seconds),
        TemporaryDirectory(prefix=".recover-", dir=path.parent) as folder,
    ):
        made = Path(folder) / path.name
        store = Store(made, root=path.parent)
        store.migrate()
        fill(store)
        if made.with_name(f"{made.name}.wal").exists():
            raise StorageError(f"{path} could not be rebuilt: DuckDB left a log behind")
        with disk_errors(path):
            kept = _set_aside(path, at)
            made.rename(path)
            sync_folder(path.parent)
    return kept


def _set_aside(path: Path, at: float) -> Path | None:
    """Rename the file and its log, so that DuckDB can still open them together."""
    if not path.exists():
        return None
    moment = datetime.fromtimestamp(at, UTC).strftime("%Y%m%dT%H%M%SZ")
    kept = move_into(path, path.parent, f"{path.name}.damaged-{moment}")
    log = path.with_name(f"{path.name}.wal")
    if log.exists():
        move_into(log, path.parent, f"{kept.name}.wal")
    return kept


@dataclass
class RecoveredBatch:
    """The rebuilt parts of a batch.

    Attributes:
        chunks: Number of chunks committed again, of `of_chunks`.
        unfinished: Outcomes in the journals of the other chunks; their runs go on with them.
        operations: Replays and discards that were applied again.
        problems: The parts that could not be rebuilt, one line each.
    """

    batch_id: str
    status: str = ""
    chunks: int = 0
    of_chunks: int = 0
    completed: int = 0
    failed: int = 0
    unfinished: int = 0
    operations: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The result of a recovery: the problem, the old file's new path, and the rebuilt batches."""

    problem: str
    set_aside: Path | None
    batches: Sequence[RecoveredBatch]

    @property
    def complete(self) -> bool:
        """Whether everything could be rebuilt."""
        return not any(batch.problems for batch in self.batches)


def find_problem(*, folder: DataFolder, store: Store) -> str | None:
    """Return the store's problem; None if it can be read and knows every batch.

    Raises:
        StoreLocked: The store cannot be read now.
        StoreOfOtherVersion: It needs another version, and no recovery.
    """
    planned = folder.batch_ids()
    if not folder.duckdb.exists():
        return f"{folder.duckdb} is missing" if planned else None
    try:
        store.check_sound()
        known = {record.batch_id for record in store.batches()}
    except (StoreLocked, StoreOfOtherVersion):
        raise
    except StorageError as error:
        return str(error).splitlines()[0]
    if unknown := [name for name in planned if name not in known and _is_to_be_known(name, folder)]:
        return f"{folder.duckdb} does not know batches: {', '.join(unknown[:5])}"
    return None


def _is_to_be_known(batch_id: str, folder: DataFolder) -> bool:
    """Whether the store should know a batch: not if it is pruned or its plan is damaged."""
    if folder.pruned_path(batch_id).exists():
        return False
    try:
        folder.read_plan(batch_id)
    except FileDamaged:
        return False
    return True


def recover(
    *, folder: DataFolder, problem: str, clock: Callable[[], float], deadline_seconds: float = 600.0
) -> Recovery:
    """Rebuild the store, whatever is left of it; the old file is renamed, never deleted.

    Runs may go on meanwhile: their commits wait. Delivered batches are assembled again.

    Args:
        problem: The reason; see `find_problem`.
        deadline_seconds: Longest wait for present writers of the store.

    Raises:
        StoreLocked: Others kept writing.
        StorageError: Nothing can be written; the old file is unchanged.
    """
    rebuilt: list[_Rebuilding] = []

    def fill(store: Store) -> None:
        for batch_id in folder.batch_ids():
            rebuilding = _Rebuilding(batch_id, folder, store)
            rebuilding.run()
            rebuilt.append(rebuilding)

    folder.create()
    # No batch may be admitted meanwhile: the new file would lack it.
    with admission_lock(folder):
        set_aside = remake(folder.duckdb, fill, at=clock(), deadline_seconds=deadline_seconds)
    store = Store(folder.duckdb, deadline_seconds=deadline_seconds)
    batches = [rebuilding.deliver_again(store) for rebuilding in rebuilt]
    return Recovery(problem=problem, set_aside=set_aside, batches=batches)


class _Rebuilding:
    """Rebuilds one batch; its problems do not affect the other batches."""

    def __init__(self, batch_id: str, folder: DataFolder, store: Store) -> None:
        self.done = RecoveredBatch(batch_id)
        self._batch_id = batch_id
        self._folder = folder
        self._store = store
        self._early_end: EarlyEnd | None = None
        self._lost_lines = False

    def run(self) -> None:
        """Rebuild the batch's rows."""
        if self._folder.pruned_path(self._batch_id).exists():
            self.done.problems.append(
                "its journals were removed after BATCH_JOURNAL_RETENTION_DAYS; its answers are in"
                f" {self._folder.outbox_path(self._batch_id)} only"
            )
            return
        with self._problem():
            plan = self._folder.read_plan(self._batch_id)
            register_batch(self._folder, self._store, self._batch_id, at=plan.created_at)
            self.done.of_chunks = len(plan.chunks)
        if not self.done.of_chunks:
            return
        with self._problem():
            self._early_end = self._folder.early_end(self._batch_id).read()
        for number in range(len(plan.chunks)):
            with self._problem(f"chunk {number}: "):
                self._commit(ChunkRef.of(plan, number, self._folder))
        with self._problem():
            self._cancel_again()
        with self._problem("replays and discards: "):
            operations = Operations(self._folder, self._batch_id)
            operations.apply_to(self._store)
            self.done.operations = len(operations.all())

    @contextlib.contextmanager
    def _problem(self, prefix: str = "") -> Iterator[None]:
        """Note the problem of one part, and let the next part be tried."""
        faults = Faults()
        with faults.of(self._batch_id):
            yield
        self.done.problems += [f"{prefix}{fault.reason}" for fault in faults]

    def _commit(self, ref: ChunkRef) -> None:
        # Raises if the journal is that of another chunk.
        replay_journal(ref.journal_path, self._batch_id, ref.chunk.number)
        entries = {entry.index: entry for entry in read_journal(ref.journal_path)}
        if not set(ref.indices) <= entries.keys():
            if self._early_end and delivered(self._folder, self._batch_id):
                at = self._early_end.at
                self._lost_lines = self._lost_lines or not _has_lines(ref)
                commit_ended(ref, self._early_end, store=self._store, run_id=ACTOR, at=at)
                self.done.chunks += 1
                return
            # If the chunk was committed before, a part of its journal is lost.
            self.done.unfinished += len(entries)
            return
        last = max(entries.values(), key=lambda entry: entry.settled_at)
        self._store.commit_chunk(
            self._batch_id,
            ref.chunk.number,
            settled_requests(ref, entries),
            run_id=last.provenance.run_id,
            at=last.settled_at,
            seconds=busy_seconds(entries.values()),
        )
        self.done.chunks += 1

    def _cancel_again(self) -> None:
        """Restore the status of a batch that was being cancelled; its next run delivers it."""
        early_end = self._early_end
        if early_end is not None and early_end.status is BatchStatus.CANCELLED:
            self._store.set_status(
                self._batch_id,
                BatchStatus.CANCELLING,
                at=early_end.at,
                actor=early_end.actor,
                reason=early_end.reason,
            )

    def deliver_again(self, store: Store) -> RecoveredBatch:
        """Write the files of a delivered batch again; return the result for the batch."""
        done = self.done
        with self._problem("samples: "):
            SampleTaker(folder=self._folder, store=store).take_in(self._batch_id)
        was_delivered = False
        with self._problem():
            was_delivered = delivered(self._folder, self._batch_id)
        if was_delivered and not done.problems:
            output = OutboxFiles(self._folder.outbox_path(self._batch_id)).output
            if missing := done.of_chunks - done.chunks:
                done.problems.append(
                    f"{missing} chunks were delivered, but their journals are not complete: their"
                    f" requests will be sent again; keep a copy of {output.parent}"
                )
            else:
                self._assemble(store, at=output.stat().st_mtime)
        if done.of_chunks:
            record = store.batch(self._batch_id)
            done.status = str(record.status)
            done.completed, done.failed = record.completed, record.failed
        return done

    def _assemble(self, store: Store, *, at: float) -> None:
        with self._problem():
            self._keep_what_only_the_files_have(store)
            # Also after that: the batch is delivered, with what is left.
            assemble(
                self._batch_id, folder=self._folder, store=store, clock=lambda: at, actor=ACTOR
            )

    def _keep_what_only_the_files_have(self, store: Store) -> None:
        """Move the delivered files aside if the rebuilt rows have less than they.

        Only a batch that ended early can lose something here: its other requests get the failure of
        the early end, also those whose answers were in a journal that is lost.
        """
        files = OutboxFiles(self._folder.outbox_path(self._batch_id))
        if self._early_end is None or not files.errors.exists():
            return
        answered = recount(self._folder.read_plan(self._batch_id), files).completed
        rebuilt = store.batch(self._batch_id).completed
        if answered <= rebuilt and not self._lost_lines:
            return
        kept = [
            move_into(path, files.folder, f"{path.stem}.before-recovery.jsonl")
            for path in (files.output, files.errors)
        ]
        self.done.problems.append(
            f"the delivered files had {answered:,} answers, its journals have {rebuilt:,}, and its"
            f" kept input {'lacks' if self._lost_lines else 'has'} the other lines: the files"
            f" are kept as {kept[0]} and {kept[1]}"
        )


def _has_lines(ref: ChunkRef) -> bool:
    """Whether the chunk's part of the kept input is there and unchanged."""
    try:
        deque(ref.lines(), maxlen=0)
    except (PlanMismatch, FileDamaged, OSError):
        return False
    return True
