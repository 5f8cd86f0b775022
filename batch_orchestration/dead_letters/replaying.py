"""Replays: send dead letters through the engine again and rewrite the output files.

Like a chunk, a replay has its own journal: each outcome is durable as soon as it exists, and a
later run of the same replay continues where the earlier one stopped. At the end all outcomes are
applied to the store in one transaction; then the files are assembled; the replay is closed last.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from batch_orchestration.core.batches import BatchPlan, settings_hash
from batch_orchestration.core.dead_letters import Replay
from batch_orchestration.core.errors import JournalError, JournalInUse, PlanMismatch, Shortage
from batch_orchestration.core.outcomes import Completion
from batch_orchestration.core.requests import Fault, Request
from batch_orchestration.core.results import Provenance
from batch_orchestration.delivery.assembly import Delivery, assemble
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.engines.memory_demand import memory_demand
from batch_orchestration.files.journal import Journal
from batch_orchestration.files.kept_input import check_settings, original_lines
from batch_orchestration.inference.chunk_pass import PendingRequest, RequestPass, TransientError
from batch_orchestration.inference.feeder import Feeder, first_leaf
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.inference.run import SYNC_SECONDS
from batch_orchestration.lifecycle.cancellation import EarlyEndWatch
from batch_orchestration.store.operations import Operations
from batch_orchestration.workers.reporter import holding, loop_watched
from batch_orchestration.workers.run_status import WORK_SECONDS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """The result of a replay.

    Attributes:
        answered: Requests that are now in the output file.
        failed: Requests that failed again and stay dead.
        assembly: Report on the rewritten files; None while the batch has pending chunks.
    """

    replay: Replay
    answered: int
    failed: int
    assembly: Delivery | None


def run_replay(
    batch_id: str,
    number: int,
    run: RunContext,
    *,
    clock: Callable[[], float] = time.time,
) -> ReplayReport:
    """Answer the replay's unanswered requests, apply the outcomes and rewrite the files.

    Idempotent: a repeated call does only the remaining work, and sends nothing for a closed replay.
    The engine is started only if a request is pending, and is left running.

    Raises:
        BatchNotFound: There is no such batch.
        DeadLetterError: The batch has no such replay.
        JournalInUse: Another process is running this replay.
        PlanMismatch: Settings or kept input differ from the plan.
        EngineError: The engine did not start, or died too often; answers received are kept.
        GpuUnhealthy: The device is not, or no longer, fit for an engine.
        StorageError: A journal or the store is unusable.
    """
    plan, operations = run.folder.read_plan(batch_id), Operations(run.folder, batch_id)
    replay = operations.get(number)
    run.status.begin_batch(batch_id)
    if replay.closed_at is None:
        check_settings(plan, run.policy.answer_settings, force=replay.force)
        try:
            if len(list(operations.outcomes(replay))) < len(replay.indices):
                _ReplayRun(plan, replay, operations, run).feed()
        finally:
            run.status.enter("committing", patience_seconds=WORK_SECONDS)
            with holding(operations.lock()):
                operations.apply_to(run.store)
    assembly = _assemble_if_complete(plan, run, clock)
    with holding(operations.lock()):
        replay = operations.get(number)
        if replay.closed_at is None:
            operations.close(replay, at=clock())
    return _report(operations.get(number), operations, assembly)


def _assemble_if_complete(
    plan: BatchPlan, run: RunContext, clock: Callable[[], float]
) -> Delivery | None:
    record = run.store.batch(plan.batch_id)
    if record.chunks_committed < record.chunks:
        return None
    return assemble(
        plan.batch_id, folder=run.folder, store=run.store, clock=clock, actor=run.run_id
    )


def _report(replay: Replay, operations: Operations, assembly: Delivery | None) -> ReplayReport:
    kinds = [isinstance(entry.outcome, Completion) for entry in operations.outcomes(replay)]
    answered = sum(kinds)
    failed = len(kinds) - answered
    logger.info(
        "%s: replay %d answered %d, failed %d", replay.batch_id, replay.number, answered, failed
    )
    return ReplayReport(replay=replay, answered=answered, failed=failed, assembly=assembly)


class _ReplayRun:
    """One run's work on a replay."""

    def __init__(
        self,
        plan: BatchPlan,
        replay: Replay,
        operations: Operations,
        run: RunContext,
    ) -> None:
        self._plan = plan
        self._replay = replay
        self._operations = operations
        self._run = run
        self._folder = run.folder
        # An ended batch may be replayed; an early end decided during the replay stops it, too.
        self._early_end = EarlyEndWatch(plan, run.folder, run_id=run.run_id, only_new=True)
        self._identity: EngineInfo | None = None
        self._journal: Journal | None = None

    def feed(self) -> None:
        """Settle every request of the replay."""
        if self._operations.running(self._replay):
            raise JournalInUse(
                f"replay {self._replay.number} of batch {self._plan.batch_id} is running already"
            )
        try:
            asyncio.run(self._feed())
        except BaseExceptionGroup as group:
            raise first_leaf(group) from group

    async def _feed(self) -> None:
        cap = self._run.policy.max_tokens_cap
        self._run.engine.fallback.expect(
            lambda: memory_demand(self._requests(), max_tokens_cap=cap)
        )
        feeder = Feeder(
            self._run,
            self._pending(),
            settled=lambda pending, outcome: None,
            started=self._started,
        )
        try:
            async with loop_watched(self._run.status), asyncio.TaskGroup() as group:
                ticker = group.create_task(self._sync())
                await self._early_end.until_early_end(feeder.feed())
                ticker.cancel()
            if self._journal is not None:
                self._journal.sync()
        finally:
            if self._journal is not None:
                self._journal.close()
            await self._run.engine.disconnect()

    def _started(self, identity: EngineInfo) -> None:
        self._identity = identity

    def _requests(self) -> Iterator[Request]:
        for line in original_lines(
            self._plan, self._replay.indices, self._folder, overrides=self._replay.overrides
        ):
            if isinstance(line.parsed, Fault):
                raise PlanMismatch(
                    f"{self._folder.input_path(self._plan.batch_id)} line {line.raw.line} cannot"
                    f" be replayed: {line.parsed.message}"
                )
            yield line.parsed

    def _pending(self) -> Iterator[PendingRequest | TransientError]:
        while self._journal is None:
            try:
                self._journal = self._open_journal()
            except Shortage as full:
                yield full
        model = self._replay.overrides.get("model", self._plan.options.model)
        replay_pass = RequestPass(
            self._plan.batch_id,
            self._replay.indices,
            self._journal,
            overrides=self._run.policy.overrides(model),
        )
        pending = frozenset(replay_pass.unsettled)
        for request in self._requests():
            if request.index in pending:
                yield replay_pass.pending_request(request)

    def _open_journal(self) -> Journal:
        identity = self._identity
        assert identity is not None
        present = dict(self._run.policy.answer_settings)
        if self._replay.overrides:
            present["replay_overrides"] = self._replay.overrides
        provenance = Provenance(
            run_id=self._run.run_id,
            engine=identity.kind,
            engine_version=identity.version,
            model=identity.models[0] if identity.models else "",
            settings_hash=settings_hash(present),
        )
        # Under the lock: a discard checks under the same lock whether the journal is being written.
        with holding(self._operations.lock()):
            if self._operations.get(self._replay.number).closed_at is not None:
                raise JournalError(f"replay {self._replay.number} was closed meanwhile")
            return self._operations.open_journal(
                self._replay, provenance=provenance, at=time.time()
            )

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            if self._journal is not None:
                with contextlib.suppress(JournalError, Shortage):
                    await asyncio.to_thread(self._journal.sync)
