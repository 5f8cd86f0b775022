"""Runs chunks: feeds pending requests to the engine and yields each chunk once it is committed.

Three threads: the caller's, which iterates; the feed's, with the event loop; the committer's.
"""

import asyncio
import contextlib
import logging
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from batch_orchestration.core.batches import BatchPlan, settings_hash
from batch_orchestration.core.errors import IllegalTransition
from batch_orchestration.core.outcomes import Outcome
from batch_orchestration.core.requests import Overrides
from batch_orchestration.core.results import Provenance
from batch_orchestration.engines.base import Engine, EngineInfo
from batch_orchestration.estimates.derivation import Derived
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.kept_input import ChunkRef, check_input_size, check_settings
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.batch_work import BatchWork
from batch_orchestration.inference.chunk_pass import PendingRequest
from batch_orchestration.inference.committer import Committed, Results
from batch_orchestration.inference.faults.halting import FailureWatch
from batch_orchestration.inference.faults.oom_recovery import chunk_needs
from batch_orchestration.inference.faults.retries import BreakerPolicy, RetryPolicy
from batch_orchestration.inference.faults.transient_errors import TransientErrors
from batch_orchestration.inference.feeder import Feeder, first_leaf
from batch_orchestration.inference.progress import CommittedChunk as CommittedChunk
from batch_orchestration.inference.scheduling import Turns
from batch_orchestration.inference.utilization import TimeBreakdowns
from batch_orchestration.inference.window.control import Bounds
from batch_orchestration.inference.window.window import Window
from batch_orchestration.lifecycle.cancellation import EarlyEndWatch
from batch_orchestration.queue.halts import halt_in_force
from batch_orchestration.store.store import Store
from batch_orchestration.workers.vitals import COMMIT_SECONDS, MARGIN_SECONDS, RunVitals

logger = logging.getLogger(__name__)

#: A power loss costs at most the answers of one such interval.
SYNC_SECONDS = 1.0
#: How often the caller's thread interrupts its wait, so that a signal reaches it.
WAIT_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class RunPolicy:
    """How chunks are fed, from the deployment's settings.

    Attributes:
        in_flight: Initial number of requests given to the engine at a time.
        bounds: Limits within which that number follows the engine's metrics; None if it is fixed.
        derive: Derives that number for an engine that was started.
        engine_restarts: Allowed restarts of a dead engine in one run.
        hang_seconds: Time without progress after which the engine counts as dead.
        answer_settings: Present settings on which answers depend; compared with each batch's plan.
        start_timeout_seconds: Until the engine must be ready.
        max_failure_rate: Share of failures above which a batch pauses, if its author sets none.
        guest_chunks: The most chunks of more urgent batches that a run serves beside its own.
    """

    in_flight: int
    bounds: Bounds | None = None
    derive: Callable[[EngineInfo], Derived] | None = None
    retry: RetryPolicy
    engine_restarts: int
    model_aliases: Mapping[str, str]
    max_tokens_cap: int | None
    answer_settings: Mapping[str, object]
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    hang_seconds: float = 100.0
    start_timeout_seconds: float = 900.0
    max_failure_rate: float = 0.5
    guest_chunks: int = 50

    @property
    def window(self) -> Window:
        """The part of the policy that the feeder needs."""
        return Window(
            in_flight=self.in_flight,
            bounds=self.bounds,
            derive=self.derive,
            retry=self.retry,
            breaker=self.breaker,
            engine_restarts=self.engine_restarts,
            hang_seconds=self.hang_seconds,
            start_timeout_seconds=self.start_timeout_seconds,
        )

    def overrides(self, model: str | None) -> Overrides:
        """Return the changes to request bodies; a given `model` answers every request."""
        return Overrides(
            model=model, aliases=self.model_aliases, max_tokens_cap=self.max_tokens_cap
        )


def run_chunks(
    selection: Mapping[str, Sequence[int]],
    *,
    engine: Engine,
    folder: DataFolder,
    store: Store,
    run_id: str,
    policy: RunPolicy,
    force: bool = False,
    vitals: RunVitals | None = None,
    throttle: Callable[[], Throttle] = Throttle,
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
        vitals: Vitals of the run, updated here.
        throttle: Returns the present throttling of the devices.

    Raises:
        BatchNotFound: There is no such batch.
        PlanMismatch: Settings or kept input differ from the plan.
        EngineError: The engine did not start, or died too often.
        GpuUnhealthy: The device is not, or no longer, fit for an engine.
        StorageError: A journal or the store is unusable.
    """
    vitals = vitals or RunVitals()
    for batch_id, numbers in selection.items():
        plan = folder.read_plan(batch_id)
        if halt_in_force(folder, batch_id) is not None:
            continue
        check_settings(plan, policy.answer_settings, force=force)
        check_input_size(plan, folder)
        batch_run = _BatchRun(
            [ChunkRef.of(plan, number, folder) for number in numbers],
            plan=plan,
            engine=engine,
            folder=folder,
            store=store,
            run_id=run_id,
            policy=policy,
            vitals=vitals,
            throttle=throttle,
        )
        yield from batch_run.committed_chunks()


class _BatchRun:
    """One run's work on the chunks of one batch, and on those of its guests."""

    def __init__(
        self,
        refs: Sequence[ChunkRef],
        *,
        plan: BatchPlan,
        engine: Engine,
        folder: DataFolder,
        store: Store,
        run_id: str,
        policy: RunPolicy,
        vitals: RunVitals,
        throttle: Callable[[], Throttle],
    ) -> None:
        self._vitals = vitals
        self._care = throttle
        self._refs = refs
        self._engine = engine
        self._folder = folder
        self._store = store
        self._policy = policy
        self._run_id = run_id
        self._settings_hash = settings_hash(dict(policy.answer_settings))
        self._identity: EngineInfo | None = None
        self._results: Results = queue.SimpleQueue()
        self._own = self._work_on(plan, refs)
        self._works = {plan.batch_id: self._own}
        self._turns = Turns(
            self._own,
            folder=folder,
            settings_hash=self._settings_hash,
            most_guest_chunks=policy.guest_chunks,
            invite=self._invite,
            cramped=lambda: engine.fallback.context_is_cut,
        )
        self._ended = 0
        self._feeder: Feeder | None = None
        self._early_end = EarlyEndWatch(plan, folder, run_id=run_id)
        self._accounts = TimeBreakdowns(
            self._own, self._turns.guests, folder=folder, run_id=run_id, vitals=vitals
        )
        self._loop = asyncio.new_event_loop()
        self._feed_task: asyncio.Task[None] | None = None
        self._feed_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run_feed, name="feed", daemon=True)

    def committed_chunks(self) -> Iterator[CommittedChunk]:
        """Feed and commit; yield each chunk as it is committed."""
        self._vitals.begin_batch(self._own.plan.batch_id)
        self._enter_commits("preparing")
        self._own.committer.start()
        self._thread.start()
        try:
            while (committed := self._next_committed()) is not None:
                self._vitals.note_progress()
                yield self._with_progress(committed)
            self._thread.join()
            if self._feed_error is not None:
                raise first_leaf(self._feed_error)
        finally:
            self._stop()

    def _next_committed(self) -> Committed | None:
        """Wait for the next commit; None once every committer has ended."""
        while True:
            try:
                result = self._results.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                if self._early_end.impatient:
                    return None
                if not self._thread.is_alive():
                    self._accounts.tick()
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
        progress = work.progress.snapshot()
        kept = self._accounts.kept_so_far if work is self._own else None
        return CommittedChunk(
            report=committed.report,
            reused=committed.reused,
            engine=self._identity,
            done=progress.completed + progress.failed,
            total=progress.total,
            completed=progress.completed,
            failed=progress.failed,
            output_tokens_per_second=progress.output_tokens_per_second,
            eta_seconds=progress.eta_seconds,
            utilization=None if kept is None else kept.fraction,
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
        self._accounts.close()

    def _run_feed(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._feed_task = self._loop.create_task(self._feed())
            self._loop.run_until_complete(self._feed_task)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            self._feed_error = error
        finally:
            for work in self._works.values():
                work.close_journals()
                work.committer.finish()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _feed(self) -> None:
        waiting = TransientErrors(waited=self._vitals.note_progress, is_over=lambda: False)
        await waiting.durably(self._own.commit_what_is_complete)
        if not self._own.can_draw:
            return self._accounts.begin_committing()
        try:
            async with (
                self._vitals.of_the_loop(),
                self._accounts.looking(),
                asyncio.TaskGroup() as group,
            ):
                ticker = group.create_task(self._tick())
                await self._early_end.until_early_end(self._answer_pending())
                ticker.cancel()
        finally:
            await self._engine.disconnect()

    async def _answer_pending(self) -> None:
        self._own.progress.write("starting engine")
        cap = self._policy.max_tokens_cap
        self._engine.fallback.expect(partial(chunk_needs, self._refs, max_tokens_cap=cap))
        self._feeder = Feeder(
            self._engine,
            self._turns.pending(),
            window=self._policy.window,
            overrides=self._overrides,
            settled=self._settled,
            started=self._started,
            vitals=self._vitals,
            throttle=self._care,
            deadline=self._deadline,
        )
        self._accounts.feeder = self._feeder
        self._own.progress.in_flight = self._own_in_flight
        self._own.progress.waiting = partial(self._feeder.waits.of, self._own.plan.batch_id)
        await self._feeder.feed()
        self._own.progress.phase = "committing"
        self._enter_commits("committing")

    def _enter_commits(self, phase: str) -> None:
        """Begin a phase that may wait for the store."""
        self._vitals.enter(phase, patience_seconds=COMMIT_SECONDS + MARGIN_SECONDS)

    def _own_in_flight(self) -> int:
        """Return how many requests of our own batch the engine has."""
        assert self._feeder is not None
        guests = sum(guest.unanswered for guest in self._turns.guests.values())
        return max(0, self._feeder.in_flight - guests)

    def _started(self, identity: EngineInfo) -> None:
        if self._identity is None:
            self._own.progress.begin_feeding()
        self._identity = identity
        self._accounts.note()

    def _invite(self, batch_id: str) -> BatchWork:
        """Attach a guest.

        Raises:
            BatchNotFound: There is no such batch.
            IllegalTransition: The batch is paused.
            PlanMismatch: The batch needs another engine, or its kept input has changed.
        """
        plan = self._folder.read_plan(batch_id)
        if (halt := halt_in_force(self._folder, batch_id)) is not None:
            raise IllegalTransition(f"batch {batch_id} is {halt}")
        check_settings(plan, self._policy.answer_settings, force=False)
        check_input_size(plan, self._folder)
        guest = self._works[batch_id] = self._work_on(plan, None)
        guest.progress.in_flight = lambda: guest.unanswered
        if self._feeder is not None:
            guest.progress.waiting = partial(self._feeder.waits.of, batch_id)
        guest.committer.start()
        guest.progress.begin_feeding()
        return guest

    def _work_on(self, plan: BatchPlan, chunks: Sequence[ChunkRef] | None) -> BatchWork:
        return BatchWork(
            plan,
            chunks,
            folder=self._folder,
            store=self._store,
            run_id=self._run_id,
            results=self._results,
            provenance=self._provenance,
            memory_level=lambda: self._engine.fallback.description,
            max_tokens_cap=self._policy.max_tokens_cap,
            vitals=self._vitals,
            failures=FailureWatch(
                plan, self._folder, run_id=self._run_id, default=self._policy.max_failure_rate
            ),
        )

    def _overrides(self, pending: PendingRequest) -> Overrides:
        plan = self._works[pending.chunk.batch_id].plan
        return self._policy.overrides(plan.options.model)

    def _deadline(self, pending: PendingRequest) -> float:
        """Return when our own batch's window ends; a guest's run enforces the guest's deadline."""
        own = pending.chunk.batch_id == self._own.plan.batch_id
        return self._early_end.deadline if own else math.inf

    def _settled(self, pending: PendingRequest, outcome: Outcome) -> None:
        work = self._works[pending.chunk.batch_id]
        work.settled(pending, outcome)
        if work.is_halted and self._feeder is not None:
            self._feeder.halt(work.plan.batch_id)

    def _provenance(self) -> Provenance:
        assert self._identity is not None
        return Provenance(
            run_id=self._run_id,
            engine=self._identity.kind,
            engine_version=self._identity.version,
            model=self._identity.models[0] if self._identity.models else "",
            settings_hash=self._settings_hash,
        )

    async def _tick(self) -> None:
        while True:
            self._own.progress.tick()
            self._note_rates()
            self._turns.look()
            for work in list(self._works.values()):
                work.look_for_halt()
                if work.has_left and self._let_go(work) and work.is_guest:
                    work.close_journals()
                    # Requests that were let go are never settled, and are no longer at the engine.
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

    def _let_go(self, work: BatchWork) -> bool:
        """Have the feeder let go of a batch; return whether the engine has none of it left."""
        if self._feeder is None:
            return False
        let_go = self._feeder.halt if work.is_halted else self._feeder.abandon
        return let_go(work.plan.batch_id)

    def _note_rates(self) -> None:
        rates = [work.progress.rates for work in self._works.values() if work.is_open]
        self._vitals.requests_per_second = sum(requests for requests, _ in rates)
        self._vitals.output_tokens_per_second = sum(tokens for _, tokens in rates)
