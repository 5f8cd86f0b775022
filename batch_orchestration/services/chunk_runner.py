"""Runs chunks: feeds what is pending to the engine and hands out each chunk once it is committed.

Three threads: the caller's, which iterates; the feed's, with the event loop; the committer's.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from batch_orchestration.domain.batches import BatchPlan, settings_hash
from batch_orchestration.domain.breaker import BreakerPolicy
from batch_orchestration.domain.commits import ChunkReport, Provenance
from batch_orchestration.domain.errors import DiskFull, JournalError
from batch_orchestration.domain.outcomes import Outcome
from batch_orchestration.domain.overrides import Overrides
from batch_orchestration.domain.retries import RetryPolicy
from batch_orchestration.engines.base import Engine, EngineIdentity
from batch_orchestration.services.chunk_pass import ChunkPass, ChunkRef, PendingRequest, RequestPass
from batch_orchestration.services.committer import Committed, Committer
from batch_orchestration.services.feeder import Feeder, Window, first_leaf
from batch_orchestration.services.ladders import chunk_needs
from batch_orchestration.services.plan_checks import check_input_size, check_settings
from batch_orchestration.services.run_progress import RunProgress, remaining_work
from batch_orchestration.storage.files import DataFolder
from batch_orchestration.storage.journal import JournalState, replay_journal
from batch_orchestration.storage.store import Store

logger = logging.getLogger(__name__)

#: Power loss costs at most what was answered in this time.
SYNC_SECONDS = 1.0
#: How often the caller's thread looks up from waiting, so that an interrupt reaches it.
WAIT_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """How chunks are fed: from the deployment's settings.

    Attributes:
        in_flight: Requests given to the engine at a time.
        engine_restarts: Of a dead engine, in one run.
        hang_seconds: Without a sign of progress, after which the engine counts as dead.
        answer_settings: What answers depend on now; compared with each batch's plan.
    """

    in_flight: int
    retry: RetryPolicy
    engine_restarts: int
    model_aliases: Mapping[str, str]
    max_tokens_cap: int | None
    answer_settings: Mapping[str, object]
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    hang_seconds: float = 120.0

    @property
    def window(self) -> Window:
        """What of it the feeder needs."""
        return Window(
            in_flight=self.in_flight,
            retry=self.retry,
            breaker=self.breaker,
            engine_restarts=self.engine_restarts,
            hang_seconds=self.hang_seconds,
        )

    def overrides(self, model: str | None) -> Overrides:
        """Return the changes to bodies, where `model` answers every request if it is given."""
        return Overrides(
            model=model, aliases=self.model_aliases, max_tokens_cap=self.max_tokens_cap
        )


@dataclass(frozen=True, kw_only=True)
class CommittedChunk:
    """A committed chunk, with how far its batch is.

    Attributes:
        reused: The store held it before this run.
        done: Requests of the batch with an outcome, of `total`.
    """

    report: ChunkReport
    reused: bool
    engine: EngineIdentity | None
    done: int
    total: int
    completed: int
    failed: int
    output_tokens_per_second: float
    eta_seconds: float | None


def run_chunks(
    selection: Mapping[str, Sequence[int]],
    *,
    engine: Engine,
    folder: DataFolder,
    store: Store,
    run_id: str,
    feeding: Feeding,
    force: bool = False,
) -> Generator[CommittedChunk, None, None]:
    """Answer what is pending in the chunks and yield each of them right after its commit.

    Requests with a durable outcome are not submitted again; the engine is started only if
    something is pending, and is left running. Closing the iterator stops the feed; every answer
    that arrived is kept.

    Args:
        selection: Chunk numbers by batch id, in the order in which they are fed.
        force: Run although settings differ from the plan's; the rows carry the present hash.

    Raises:
        BatchNotFound: No such batch.
        PlanMismatch: Settings or kept input are not those of the plan.
        EngineError: The engine did not start, or died too often.
        StorageError: A journal or the store is unusable.
    """
    for batch_id, numbers in selection.items():
        plan = folder.read_plan(batch_id)
        check_settings(plan, feeding.answer_settings, force=force)
        check_input_size(plan, folder)
        batch_run = _BatchRun(
            [ChunkRef.of(plan, number, folder) for number in numbers],
            plan=plan,
            engine=engine,
            folder=folder,
            store=store,
            run_id=run_id,
            feeding=feeding,
        )
        yield from batch_run.committed_chunks()


class _BatchRun:
    """One run's work on the chunks of one batch."""

    def __init__(
        self,
        refs: Sequence[ChunkRef],
        *,
        plan: BatchPlan,
        engine: Engine,
        folder: DataFolder,
        store: Store,
        run_id: str,
        feeding: Feeding,
    ) -> None:
        self._refs = refs
        self._plan = plan
        self._engine = engine
        self._feeding = feeding
        self._run_id = run_id
        self._pruned = folder.pruned_path(plan.batch_id).exists()
        self._identity: EngineIdentity | None = None
        self._open: dict[RequestPass, ChunkRef] = {}
        self._progress = RunProgress(
            plan,
            folder.progress_path(plan.batch_id),
            run_id=run_id,
            chunks=refs,
            remaining=remaining_work(folder, plan.batch_id),
            max_tokens_cap=feeding.max_tokens_cap,
        )
        self._committer = Committer(
            store,
            batch_id=plan.batch_id,
            run_id=run_id,
            known=self._progress.learn_committed,
        )
        self._loop = asyncio.new_event_loop()
        self._feed_task: asyncio.Task[None] | None = None
        self._feed_error: BaseException | None = None
        self._thread = threading.Thread(target=self._run_feed, name="feed", daemon=True)

    def committed_chunks(self) -> Iterator[CommittedChunk]:
        """Feed and commit; yield each chunk as it is committed."""
        self._committer.start()
        self._thread.start()
        try:
            while (committed := self._next_committed()) is not None:
                yield self._with_progress(committed)
            self._thread.join()
            if self._feed_error is not None:
                raise first_leaf(self._feed_error)
        finally:
            self._stop()

    def _next_committed(self) -> Committed | None:
        while True:
            try:
                result = self._committer.results.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                continue
            if isinstance(result, BaseException):
                raise result
            return result

    def _with_progress(self, committed: Committed) -> CommittedChunk:
        progress = self._progress.snapshot()
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
        )

    def _stop(self) -> None:
        if self._feed_task is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # The loop closed in between.
                self._loop.call_soon_threadsafe(self._feed_task.cancel)
        self._thread.join()
        self._committer.stop()
        self._progress.write("done" if self._feed_error is None else "stopped")

    def _run_feed(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._feed_task = self._loop.create_task(self._feed())
            self._loop.run_until_complete(self._feed_task)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            self._feed_error = error
        finally:
            for chunk_pass in self._open:
                chunk_pass.journal.close()
            self._committer.finish()
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _feed(self) -> None:
        waiting = deque(self._refs)
        while waiting and self._is_complete(waiting[0]):
            self._committer.add(waiting.popleft())
        if not waiting:
            return
        try:
            async with asyncio.TaskGroup() as group:
                ticker = group.create_task(self._tick())
                await self._answer_pending(waiting)
                ticker.cancel()
        finally:
            await self._engine.disconnect()

    async def _answer_pending(self, refs: Iterable[ChunkRef]) -> None:
        self._progress.write("starting engine")
        cap = self._feeding.max_tokens_cap
        self._engine.ladder.expect(partial(chunk_needs, self._refs, max_tokens_cap=cap))
        feeder = Feeder(
            self._engine,
            self._pending(refs),
            window=self._feeding.window,
            overrides=self._feeding.overrides(self._plan.options.model),
            settled=self._settled,
            started=self._started,
        )
        self._progress.in_flight = lambda: feeder.in_flight
        await feeder.feed()
        self._progress.phase = "committing"

    def _started(self, identity: EngineIdentity) -> None:
        if self._identity is None:
            self._progress.begin_feeding()
        self._identity = identity

    def _is_complete(self, ref: ChunkRef) -> bool:
        if self._pruned:
            return True  # Committed and delivered; `Committer` finds it in the store.
        state = replay_journal(ref.journal_path, self._plan.batch_id, ref.chunk.number)
        if len(state.settled) < ref.chunk.requests:
            return False
        self._count_found(state)
        return True

    def _count_found(self, state: JournalState) -> None:
        self._progress.count_found(state.completed, len(state.settled) - state.completed)

    def _pending(self, refs: Iterable[ChunkRef]) -> Iterator[PendingRequest | DiskFull]:
        for ref in refs:
            chunk_pass = yield from self._opened(ref)
            self._open[chunk_pass] = ref
            self._count_found(chunk_pass.journal.state)
            yield from chunk_pass.pending()
            self._seal_if_complete(chunk_pass)

    def _opened(self, ref: ChunkRef) -> Generator[DiskFull, None, ChunkPass]:
        """Open a chunk for writing; as long as the disk has no room, say so and try again."""
        while True:
            try:
                return ChunkPass(ref, provenance=self._provenance())
            except DiskFull as full:
                yield full

    def _settled(self, pending: PendingRequest, outcome: Outcome) -> None:
        self._progress.count(outcome, pending.request)
        self._seal_if_complete(pending.chunk)

    def _seal_if_complete(self, chunk_pass: RequestPass) -> None:
        if chunk_pass.complete and (ref := self._open.pop(chunk_pass, None)) is not None:
            # A disk without room for the sync has none for the commit either, which waits for it.
            with contextlib.suppress(DiskFull):
                chunk_pass.journal.sync()
            chunk_pass.journal.close()
            self._committer.add(ref, engine_rung=self._engine.ladder.description)

    def _provenance(self) -> Provenance:
        assert self._identity is not None
        return Provenance(
            run_id=self._run_id,
            engine=self._identity.kind,
            engine_version=self._identity.version,
            model=self._identity.models[0] if self._identity.models else "",
            settings_hash=settings_hash(dict(self._feeding.answer_settings)),
        )

    async def _tick(self) -> None:
        while True:
            self._progress.tick()
            for chunk_pass in list(self._open):
                # Closed in between: it was synced before.
                with contextlib.suppress(JournalError, DiskFull):
                    await asyncio.to_thread(chunk_pass.journal.sync)
            await asyncio.sleep(SYNC_SECONDS)
