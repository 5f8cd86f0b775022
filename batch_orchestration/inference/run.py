"""Runs chunks: feeds pending requests to the engine and yields each chunk once it is committed.

Three threads: the caller's, which iterates; the feed's, with the event loop; the committer's.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence

from batch_orchestration.core.batches import BatchPlan, MemoryDemand, settings_hash
from batch_orchestration.core.errors import EngineError, GpuUnhealthy, IllegalTransition
from batch_orchestration.core.outcomes import Outcome
from batch_orchestration.core.results import Provenance
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.engines.memory_demand import combined
from batch_orchestration.files.kept_input import ChunkRef, check_input_size, check_settings
from batch_orchestration.inference.batch_work import BatchWork
from batch_orchestration.inference.chunk_pass import PendingRequest
from batch_orchestration.inference.committer import Committed, Results
from batch_orchestration.inference.faults.transient_errors import TransientErrors
from batch_orchestration.inference.feeder import Feeder, first_leaf
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.inference.progress import CommittedChunk as CommittedChunk
from batch_orchestration.inference.scheduling import Turns
from batch_orchestration.inference.utilization import TimeBreakdowns
from batch_orchestration.lifecycle.cancellation import EarlyEndWatch
from batch_orchestration.queue.halts import halt_in_force
from batch_orchestration.workers.reporter import loop_watched
from batch_orchestration.workers.run_status import COMMIT_SECONDS, MARGIN_SECONDS

logger = logging.getLogger(__name__)

#: A power loss costs at most the answers of one such interval.
SYNC_SECONDS = 1.0
#: How often the caller's thread interrupts its wait, so that a signal reaches it.
WAIT_SECONDS = 0.5


def run_chunks(
    selection: Mapping[str, Sequence[int]], run: RunContext, *, force: bool = False
) -> Generator[CommittedChunk, None, None]:
    """Answer the pending requests of the chunks, and yield each chunk right after its commit.

    Requests with a durable outcome are not submitted again. The engine is started only if a request
    is pending, and is left running. Closing the iterator stops the feed, and every answer that
    arrived is kept. An early end of a batch (`lifecycle.cancellation`) has the same effect within
    seconds. A paused batch (`inference.faults.halting`) is skipped, and left if paused meanwhile.

    If other batches come first (see `inference.scheduling`), their chunks are fed and yielded, too.
    If the run makes room for others, it ends early, with chunks of its own left to do.

    Args:
        selection: Chunk numbers by batch id, in the order in which they are fed.
        force: Run even if settings differ from the plan's; rows carry the present hash.

    Raises:
        BatchNotFound: There is no such batch.
        PlanMismatch: Settings or kept input differ from the plan.
        EngineError: The engine did not start, or died too often.
        GpuUnhealthy: The device is not, or no longer, fit for an engine.
        StorageError: A journal or the store is unusable.
    """
    for batch_id, numbers in selection.items():
        plan = run.folder.read_plan(batch_id)
        if halt_in_force(run.folder, batch_id) is not None:
            continue
        check_settings(plan, run.policy.answer_settings, force=force)
        check_input_size(plan, run.folder)
        refs = [ChunkRef.of(plan, number, run.folder) for number in numbers]
        yield from _BatchRun(plan, refs, run).committed_chunks()


class _BatchRun:
    """One run's work on the chunks of one batch, and on those of its guests."""

    def __init__(self, plan: BatchPlan, refs: Sequence[ChunkRef], run: RunContext) -> None:
        self._run = run
        self._status = run.status
        # The plan's demand is that of the plan's cap; under another one (`force`) it is not known.
        is_of_plan = plan.settings.get("max_tokens_cap") == run.policy.max_tokens_cap
        demand = combined(ref.chunk.memory for ref in refs) if is_of_plan else MemoryDemand()
        run.engine.fallback.expect(lambda: demand)
        self._settings_hash = settings_hash(dict(run.policy.answer_settings))
        self._identity: EngineInfo | None = None
        self._results: Results = queue.SimpleQueue()
        self._early_end = EarlyEndWatch(plan, run.folder, run_id=run.run_id)
        self._own = self._work_on(plan, refs)
        self._works = {plan.batch_id: self._own}
        self._turns = Turns(
            self._own,
            folder=run.folder,
            settings_hash=self._settings_hash,
            most_guest_chunks=run.policy.guest_chunks,
            invite=self._invite,
            cramped=lambda: run.engine.fallback.context_is_cut,
        )
        self._ended = 0
        self._feeder = Feeder(
            run, self._turns.pending(), settled=self._settled, started=self._started
        )
        self._breakdowns = TimeBreakdowns(self._own, self._turns.guests, self._feeder, run)
        self._loop = asyncio.new_event_loop()
        self._feed_task: asyncio.Task[None] | None = None
        self._feed_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run_feed, name="feed", daemon=True)

    def committed_chunks(self) -> Iterator[CommittedChunk]:
        """Feed and commit; yield each chunk as it is committed."""
        self._status.begin_batch(self._own.plan.batch_id)
        self._enter_commits("preparing")
        self._own.committer.start()
        self._thread.start()
        try:
            while (committed := self._next_committed()) is not None:
                self._status.note_progress()
                yield self._with_progress(committed)
            self._thread.join()
            if self._feed_error is not None:
                raise first_leaf(self._feed_error)
        finally:
            self._stop()

    def _run_feed(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._feed_task = self._loop.create_task(self._feed())
            self._loop.run_until_complete(self._feed_task)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            self._feed_error = error
            if isinstance(first_leaf(error), EngineError | GpuUnhealthy):
                # No other run shall find it warm. What survives is ended before the next start.
                with contextlib.suppress(EngineError):
                    self._run.engine.stop()
        finally:
            for work in self._works.values():
                work.close_journals()
                work.committer.finish()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _feed(self) -> None:
        await TransientErrors(self._status).durably(self._own.commit_what_is_complete)
        if not self._own.can_draw:
            return self._breakdowns.begin_committing()
        self._own.progress.write("starting engine")
        try:
            async with (
                loop_watched(self._status),
                self._breakdowns.sampled(),
                asyncio.TaskGroup() as group,
            ):
                ticker = group.create_task(self._tick())
                await self._early_end.until_early_end(self._feeder.feed())
                ticker.cancel()
            self._own.progress.phase = "committing"
            self._enter_commits("committing")
        finally:
            await self._run.engine.disconnect()

    async def _tick(self) -> None:
        while True:
            for work in list(self._works.values()):
                work.progress.waiting = self._feeder.waits.of(work.plan.batch_id)
            self._own.progress.tick()
            self._note_rates()
            self._turns.look()
            for work in list(self._works.values()):
                work.look_for_halt()
                if work.has_left and self._drop(work) and work.is_guest:
                    work.close_journals()
                    # Requests that were dropped are never settled, and have left the engine.
                    work.unanswered = 0
            for guest in list(self._turns.guests.values()):
                if guest.is_open:
                    guest.progress.tick()
                elif guest.progress.phase != "done":
                    # From now on the guest's own run may write the file.
                    guest.progress.write("done")
            for work in list(self._works.values()):
                await asyncio.to_thread(work.sync)
            await asyncio.sleep(SYNC_SECONDS)

    def _drop(self, work: BatchWork) -> bool:
        """Drop a batch's requests; return whether the engine has none of them left."""
        drop = self._feeder.halt if work.is_halted else self._feeder.abandon
        return drop(work.plan.batch_id)

    def _note_rates(self) -> None:
        rates = [work.progress.rates for work in self._works.values() if work.is_open]
        self._status.requests_per_second = sum(requests for requests, _ in rates)
        self._status.output_tokens_per_second = sum(tokens for _, tokens in rates)

    def _started(self, identity: EngineInfo) -> None:
        if self._identity is None:
            self._own.progress.begin_feeding()
        self._identity = identity
        self._breakdowns.note()

    def _settled(self, pending: PendingRequest, outcome: Outcome) -> None:
        work = self._works[pending.chunk.batch_id]
        work.settled(pending, outcome)
        if work.is_halted:
            self._feeder.halt(work.plan.batch_id)

    def _enter_commits(self, phase: str) -> None:
        """Begin a phase that may wait for the store."""
        self._status.enter(phase, patience_seconds=COMMIT_SECONDS + MARGIN_SECONDS)

    def _next_committed(self) -> Committed | None:
        """Wait for the next commit; None once every committer has ended."""
        while True:
            try:
                result = self._results.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                if self._early_end.impatient:
                    return None
                if not self._thread.is_alive():
                    self._breakdowns.tick()
                continue
            if isinstance(result, BaseException):
                raise result
            if result is not None:
                return result
            # Our own committer ends after the last guest has joined; a guest's may end earlier.
            self._ended += 1
            if self._ended == len(self._works):
                return None

    def _with_progress(self, committed: Committed) -> CommittedChunk:
        work = self._works[committed.report.batch_id]
        total = self._breakdowns.utilization if work is self._own else None
        return CommittedChunk(
            report=committed.report,
            reused=committed.reused,
            engine=self._identity,
            progress=work.progress.snapshot(),
            utilization=None if total is None else total.fraction,
        )

    def _stop(self) -> None:
        if self._feed_task is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # The loop closed in between.
                self._loop.call_soon_threadsafe(self._feed_task.cancel)
        self._thread.join()
        for work in self._works.values():
            work.committer.stop()
            if work is self._own or work.progress.phase != "done":
                work.progress.write("done" if self._feed_error is None else "stopped")
        self._breakdowns.close()

    def _invite(self, batch_id: str) -> BatchWork:
        """Attach a guest.

        Raises:
            BatchNotFound: There is no such batch.
            IllegalTransition: The batch is paused.
            PlanMismatch: The batch needs another engine, or its kept input has changed.
        """
        folder = self._run.folder
        plan = folder.read_plan(batch_id)
        if (halt := halt_in_force(folder, batch_id)) is not None:
            raise IllegalTransition(f"batch {batch_id} is {halt}")
        check_settings(plan, self._run.policy.answer_settings, force=False)
        check_input_size(plan, folder)
        guest = self._works[batch_id] = self._work_on(plan, None)
        guest.committer.start()
        guest.progress.begin_feeding()
        return guest

    def _work_on(self, plan: BatchPlan, chunks: Sequence[ChunkRef] | None) -> BatchWork:
        return BatchWork(
            plan,
            chunks,
            self._run,
            results=self._results,
            provenance=self._provenance,
            # A guest's own run enforces the guest's deadline.
            deadline=math.inf if chunks is None else self._early_end.deadline,
        )

    def _provenance(self) -> Provenance:
        assert self._identity is not None
        return Provenance(
            run_id=self._run.run_id,
            engine=self._identity.kind,
            engine_version=self._identity.version,
            model=self._identity.models[0] if self._identity.models else "",
            settings_hash=self._settings_hash,
        )
