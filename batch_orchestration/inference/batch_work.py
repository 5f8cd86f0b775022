"""One batch's part of a run: its chunks, open journals, progress file and commits."""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from batch_orchestration.core.batches import BatchPlan
from batch_orchestration.core.errors import JournalError, JournalInUse, Shortage, StorageError
from batch_orchestration.core.outcomes import Outcome
from batch_orchestration.core.results import ChunkReport, Provenance
from batch_orchestration.files.journal import JournalState, replay_journal
from batch_orchestration.files.kept_input import ChunkRef
from batch_orchestration.inference.chunk_pass import (
    ChunkPass,
    PendingRequest,
    RequestPass,
    TransientError,
)
from batch_orchestration.inference.committer import Committer, Results
from batch_orchestration.inference.faults.halting import FailureWatch
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.inference.progress import RunProgress, remaining_work
from batch_orchestration.queue.halts import halt_in_force

logger = logging.getLogger(__name__)


class BatchWork:
    """The chunks of one batch that a run feeds, in order, and their outcomes.

    Used from the feed's thread; the committer's thread reports the committed chunks.

    Args:
        chunks: Chunks to feed; None for a guest: all that are neither committed nor in use.
        results: Queue for the committed chunks.
        provenance: Available once the engine has started.
        deadline: End of the batch's window, if this run enforces it.

    Attributes:
        unanswered: Requests that were drawn and have no outcome yet.
        chunks_drawn: Chunks that were opened.
        has_left: True once the run draws no more requests from this batch.
        is_halted: Whether it left because too many of its requests fail.
    """

    def __init__(
        self,
        plan: BatchPlan,
        chunks: Sequence[ChunkRef] | None,
        run: RunContext,
        *,
        results: Results,
        provenance: Callable[[], Provenance],
        deadline: float,
    ) -> None:
        folder = run.folder
        self._run = run
        self._overrides = run.policy.overrides(plan.options.model)
        self._deadline = deadline
        self._failures = FailureWatch(
            plan, folder, run_id=run.run_id, default=run.policy.max_failure_rate
        )
        self.plan = plan
        self.is_guest = chunks is None
        self.unanswered = self.chunks_drawn = 0
        self.has_left = self.is_halted = False
        self.progress = RunProgress(
            plan,
            folder.progress_path(plan.batch_id),
            run_id=run.run_id,
            chunks=chunks or (),
            remaining=remaining_work(folder, plan.batch_id),
            max_tokens_cap=run.policy.max_tokens_cap,
        )
        self._pruned = folder.pruned_path(plan.batch_id).exists()
        self._provenance = provenance
        self._refs = deque(chunks or ())
        #: Set by the committer's thread once the committed chunks are known.
        self._takeable: Sequence[ChunkRef] | None = None
        self._open: dict[RequestPass, ChunkRef] = {}
        self._drawing: ChunkPass | None = None
        self._requests: Iterator[PendingRequest] = iter(())
        #: How many chunks in a row were in use by another run.
        self._in_use = 0
        self.committer = Committer(
            run.store,
            batch_id=plan.batch_id,
            run_id=run.run_id,
            known=self._learn_committed,
            results=results,
            is_guest=self.is_guest,
            status=run.status,
        )

    @property
    def mid_chunk(self) -> bool:
        """Whether a chunk is begun and not all of its requests are drawn."""
        return self._drawing is not None

    @property
    def can_draw(self) -> bool:
        """Whether there may be something to draw."""
        self._take_in()
        return self.mid_chunk or bool(self._refs)

    def commit_what_is_complete(self) -> None:
        """Pass the leading chunks on to the committer, as long as their journals are complete."""
        while self._refs and self._is_complete(self._refs[0]):
            self.committer.add(self._refs.popleft())

    def draw(self) -> PendingRequest | TransientError | None:
        """Return the next request of the chunk in hand, or of the next chunk.

        None at the end of a chunk, and for a chunk that has no pending request.

        Raises:
            PlanMismatch: The kept input is not the one that was admitted.
            StorageError: A journal is unusable.
        """
        if self._drawing is None:
            if not self._refs:
                return None
            if (transient := self._begin_chunk()) is not None or self._drawing is None:
                return transient
        try:
            pending = next(self._requests, None)
        except Shortage as shortage:
            # Raised when the kept input is opened: nothing of the chunk is drawn yet.
            self._requests = self._drawing.pending()
            return shortage
        if pending is None:
            drawn, self._drawing = self._drawing, None
            self._seal_if_complete(drawn)
            return None
        self.unanswered += 1
        return pending

    def settled(self, pending: PendingRequest, outcome: Outcome) -> None:
        """Count an outcome that has just become durable."""
        self.unanswered -= 1
        self.progress.count(outcome, pending.request)
        if not self.has_left and self._failures.note(
            outcome, pending.request, unasked=self.progress.pending - self.unanswered
        ):
            self.halt()
        self._seal_if_complete(pending.chunk)

    def halt(self) -> None:
        """Draw nothing more, because too many of its requests fail."""
        self.is_halted = True
        self.leave()

    def look_for_halt(self) -> None:
        """Halt if another run has halted the batch meanwhile."""
        # An unreadable halt counts as in force; other unreadable decisions are reported elsewhere.
        with contextlib.suppress(StorageError):
            if not self.has_left and halt_in_force(self._run.folder, self.plan.batch_id):
                self.halt()

    def leave(self) -> None:
        """Draw nothing more, not even the rest of the chunk in hand."""
        self.has_left = True
        self._refs.clear()
        self._takeable = ()
        self._drawing = None

    def ends_early(self) -> bool:
        """Whether an early end of the batch has been decided."""
        return self._run.folder.early_end(self.plan.batch_id).path.exists()

    def sync(self) -> None:
        """Make the records in the open journals survive a power loss."""
        for chunk_pass in list(self._open):
            # A journal that was closed in between was synced before.
            with contextlib.suppress(JournalError, Shortage):
                chunk_pass.journal.sync()

    def close_journals(self) -> None:
        """Close the journals of incomplete chunks, so that other runs can write them."""
        while self._open:
            self._open.popitem()[0].journal.close()

    @property
    def is_open(self) -> bool:
        """Whether a chunk is begun and not complete."""
        return bool(self._open)

    def _take_in(self) -> None:
        if self._takeable is not None and self.is_guest:
            self._refs.extend(self._takeable)
            self._takeable = ()

    def _learn_committed(self, reports: Iterable[ChunkReport]) -> None:
        known = list(reports)
        self.progress.learn_committed(known)
        if self.is_guest and self._takeable is None:
            numbers = {report.number for report in known}
            self._takeable = [
                ChunkRef.of(self.plan, chunk.number, self._run.folder)
                for chunk in self.plan.chunks
                if chunk.number not in numbers
            ]

    def _begin_chunk(self) -> TransientError | None:
        """Open the next chunk for writing; return the transient error that prevents it, if any."""
        ref = self._refs.popleft()
        try:
            chunk_pass = ChunkPass(
                ref,
                provenance=self._provenance(),
                overrides=self._overrides,
                deadline=self._deadline,
            )
        except Shortage as full:
            self._refs.appendleft(ref)
            return full
        except JournalInUse as in_use:
            return self._skip(ref, in_use)
        self._in_use = 0
        self.chunks_drawn += 1
        self._run.status.begin_chunk(self.plan.batch_id, ref.chunk.number)
        self.progress.phase = "feeding"
        self._open[chunk_pass] = ref
        self._count_found(chunk_pass.journal.state)
        self._drawing, self._requests = chunk_pass, chunk_pass.pending()
        return None

    def _skip(self, ref: ChunkRef, in_use: JournalInUse) -> JournalInUse | None:
        """Leave a chunk to the run that is using it: a guest's for good, our own until it is free.

        Our other chunks come first; only if all of them are in use does the run wait.
        """
        if self.is_guest:
            return None
        self._refs.append(ref)
        self._in_use += 1
        if self._in_use < len(self._refs):
            return None
        self._in_use = 0
        return in_use

    def _is_complete(self, ref: ChunkRef) -> bool:
        if self._pruned:
            return True  # Committed and delivered; `Committer` finds it in the store.
        state = replay_journal(ref.journal_path, self.plan.batch_id, ref.chunk.number)
        if len(state.settled) < ref.chunk.requests:
            return False
        self._count_found(state)
        return True

    def _count_found(self, state: JournalState) -> None:
        self.progress.count_found(state.completed, len(state.settled) - state.completed)

    def _seal_if_complete(self, chunk_pass: RequestPass) -> None:
        if chunk_pass.complete and (ref := self._open.pop(chunk_pass, None)) is not None:
            # A disk without room for the sync has none for the commit either, which waits for room.
            with contextlib.suppress(Shortage):
                chunk_pass.journal.sync()
            chunk_pass.journal.close()
            self.committer.add(ref, memory_level=self._run.engine.fallback.description)
