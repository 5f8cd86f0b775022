"""Keeps the engine busy: a bounded window of requests in flight, which spans chunks."""

import asyncio
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import EngineDied, EngineSick, GpuUnhealthy
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Outcome
from batch_orchestration.core.requests import prepare_body
from batch_orchestration.engines.access import CHAT, is_doubtful
from batch_orchestration.engines.base import EngineInfo
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.inference.chunk_pass import PendingRequest, TransientError
from batch_orchestration.inference.faults.access import AccessCheck
from batch_orchestration.inference.faults.engine_life import EngineLife
from batch_orchestration.inference.faults.hang_watch import POLLS_PER_LIMIT, HangWatch
from batch_orchestration.inference.faults.isolation import LABEL_END, Isolation, to_confirm
from batch_orchestration.inference.faults.oom_recovery import OomRecovery
from batch_orchestration.inference.faults.retries import Breaker, retry_delay
from batch_orchestration.inference.faults.transient_errors import TransientErrors
from batch_orchestration.inference.policy import RunContext
from batch_orchestration.inference.waiting import EngineWaits
from batch_orchestration.inference.window.window import EnginePoll, RequestWindow

logger = logging.getLogger(__name__)

#: Between checks of an open breaker.
BREAKER_POLL_SECONDS = 0.2


class Feeder:
    """Draws pending requests from a source and settles each of them.

    A request waiting for its next attempt keeps its place, so that a failing engine is fed less.

    When the engine dies, the requests in flight are suspects and are tested apart (see
    `inference.faults.isolation`); the death costs no request an attempt. Suspects and fresh
    requests take turns and never share a window. A fresh turn lasts at least as long as the
    preceding turn of suspects, so that fresh requests always get half of the time. A death with a
    single suspect counts against it only if the engine had answered since its start. An engine that
    dies on controls, too, is given up and convicts no request.

    A refusal that may be the gate's is recorded only after something else was let in (see
    `inference.faults.access`).

    An engine that ran out of memory makes no suspects. It is restarted at ever lower memory levels
    (see `inference.faults.oom_recovery`) until none is left.

    A source that yields a transient error, such as a full disk, is asked again later.

    Throttling may narrow the window, pause it, or end the feed: then requests in flight are
    answered, and nothing more is given to the engine.
    """

    def __init__(
        self,
        run: RunContext,
        source: Iterator[PendingRequest | TransientError],
        *,
        settled: Callable[[PendingRequest, Outcome], None],
        started: Callable[[EngineInfo], None],
    ) -> None:
        engine, policy, status = run.engine, run.policy, run.status
        self._engine, self._policy, self._status = engine, policy, status
        self._source = source
        self._settled = settled
        self._started = started
        self._isolation: Isolation[PendingRequest] = Isolation()
        self._memory = OomRecovery(engine.fallback, in_flight=policy.most_in_flight)
        self.window = RequestWindow(run, memory=self._memory)
        self._transient_errors = TransientErrors(status, self.window)
        self._breaker = Breaker(policy.breaker)
        self._hang_watch = HangWatch(engine, floor_seconds=policy.hang_seconds, status=status)
        most_seconds = policy.hang_seconds / POLLS_PER_LIMIT
        self._poll = EnginePoll(engine, react=self._react, most_seconds=most_seconds)
        self._life = EngineLife(
            engine,
            policy=policy,
            status=status,
            memory=self._memory,
            isolation=self._isolation,
            started=self._engine_started,
            control=self._send_control,
        )
        self._access_check = AccessCheck(
            self._send,
            where=engine.name,
            retry=policy.retry,
            window=self.window,
            transient_errors=self._transient_errors,
        )
        #: Endpoint of the latest submission, for controls before the first answer.
        self._latest_endpoint = CHAT
        #: Drawn from the source and still without an outcome, in the order of drawing.
        self._unanswered: dict[PendingRequest, None] = {}
        #: Requests that a dead engine left unanswered and that are not suspect.
        self._resubmit: deque[PendingRequest] = deque()
        #: Requests that are being answered now.
        self._tasks: dict[PendingRequest, asyncio.Task[None]] = {}
        self._abandoned: set[str] = set()
        self._halted: set[str] = set()
        self._source_is_dry = False
        #: Waits that the engine asked for.
        self.waits = EngineWaits()

    @property
    def is_dry(self) -> bool:
        """Whether nothing is left to give to the engine."""
        return self._fresh_is_over and not self._isolation

    async def feed(self) -> None:
        """Settle everything that the source yields.

        Raises:
            EngineStartFailed: The engine did not become ready.
            EngineDied: The limit of restarts is exceeded.
            EngineSick: The engine fails nearly everything, or dies on controls, too.
            EngineRefusesUs: The engine refuses access.
            GpuUnhealthy: Throttling ended the feed; the remaining requests are left to a later run.
        """
        loop = asyncio.get_running_loop()
        await self._life.start()
        suspects_took = 0.0
        while self._isolation or not self._fresh_is_over:
            if self._isolation and (self._fresh_is_over or not self._needs_proof):
                began = loop.time()
                if self._needs_proof:
                    await self._life.prove_sound()
                await self._run_turn_of_suspects(*self._isolation.next_group())
                suspects_took = loop.time() - began
            await self._run_turn_of_fresh(loop.time() + suspects_took)

    @property
    def _needs_proof(self) -> bool:
        """Whether the engine has to answer something before the next suspect is tested.

        If another restart is allowed, it has to do so after the suspect's death instead. The proof
        is needed because an engine worn out by one request dies with the next one, whichever it is.
        A fresh request is as good a proof as a control, and costs nothing.
        """
        last_chance = self._isolation.may_convict and not self._life.may_restart
        return last_chance and not self._life.deaths.proven

    def abandon(self, batch_id: str) -> bool:
        """Drop a batch's drawn requests; return whether none of them is being answered.

        From then on nothing more is recorded about its requests.
        """
        self._abandoned.add(batch_id)
        theirs = self._tasks_of(batch_id)
        for task in theirs:
            task.cancel()
        return not theirs

    def halt(self, batch_id: str) -> bool:
        """Give the engine no more requests of a batch, not even for another attempt.

        Requests that the engine has are settled. Return whether that is done.
        """
        self._halted.add(batch_id)
        return not self._tasks_of(batch_id)

    def _tasks_of(self, batch_id: str) -> list[asyncio.Task[None]]:
        return [task for pending, task in self._tasks.items() if pending.chunk.batch_id == batch_id]

    def _is_dropped(self, pending: PendingRequest) -> bool:
        return pending.chunk.batch_id in self._abandoned | self._halted

    def _without_dropped(self, requests: Iterable[PendingRequest]) -> list[PendingRequest]:
        return [pending for pending in requests if not self._is_dropped(pending)]

    @property
    def _fresh_is_over(self) -> bool:
        return self._source_is_dry and not self._resubmit

    def _fresh(self, until: float) -> Iterator[PendingRequest | TransientError]:
        """Yield fresh requests to the end, or, while suspects wait, until the time `until`."""
        loop = asyncio.get_running_loop()
        while not self._isolation or self._needs_proof or loop.time() < until:
            if self._resubmit:
                if not self._is_dropped(again := self._resubmit.popleft()):
                    yield again
            elif (pending := next(self._source, None)) is None:
                self._source_is_dry = True
                return
            elif isinstance(pending, TransientError) or pending.suspect_group is None:
                yield pending
            else:
                self._isolation.add(pending.suspect_group, pending)

    async def _run_turn_of_fresh(self, until: float) -> None:
        death = await self._run_window(self._fresh(until))
        if death is None:
            return
        left, self._unanswered = self._without_dropped(self._unanswered), {}
        suspects = [pending for pending in left if pending.in_flight]
        if await self._life.ease(death):
            self._resubmit.extend(left)
        else:
            self._resubmit.extend(pending for pending in left if not pending.in_flight)
            logger.warning("%d requests were in flight and are suspect: %s", len(suspects), death)
            label = f"{secrets.token_hex(4)}{LABEL_END}"
            await self._suspect(label if len(suspects) > 1 else to_confirm(label), suspects)
        for pending in left:
            pending.in_flight = False
        await self._life.restart(death)

    async def _run_turn_of_suspects(self, label: str, group: list[PendingRequest]) -> None:
        group = self._without_dropped(group)
        logger.info("testing %d suspects alone (group %s)", len(group), label)
        untested = iter(group)
        was_proven, death = self._life.deaths.proven, await self._run_window(untested)
        if death is None:
            self._isolation.note_answered(label)
            return
        left = self._without_dropped([*self._unanswered, *untested])
        self._unanswered = {}
        for pending in left:
            pending.in_flight = False
        if await self._life.ease(death):
            for pending in left:
                self._isolation.add(label, pending)
        elif len(group) > 1:
            await self._suspect(label, left)
        elif left and self._isolation.is_certain(label, exhausted=death.exhaustion is not None):
            await self._judge(label, left[0], death, was_proven=was_proven)
            return
        else:
            # An outside cause may have killed the engine just then.
            await self._suspect(to_confirm(label), left)
        await self._life.restart(death)

    async def _judge(
        self, label: str, pending: PendingRequest, death: EngineDied, *, was_proven: bool
    ) -> None:
        """Convict a request that killed the engine alone, if the engine answers something else."""
        if death.exhaustion:
            # Before the restart, so that the others are answered as configured.
            self._memory.note_culprit()
        if was_proven:
            await self._convict(label, pending, death)
            await self._life.restart(death)
        elif await self._life.restart(death) and await self._life.prove_sound():
            await self._convict(label, pending, death)
        else:
            # The engine died on a control, too, and then answered one.
            await self._suspect(to_confirm(label), [pending])

    async def _suspect(self, label: str, suspects: list[PendingRequest]) -> None:
        for pending, group in self._isolation.split(label, suspects).items():
            await self._transient_errors.durably(partial(pending.suspect, group))
            crash_point(CrashPoint.AFTER_SUSPECT)

    async def _convict(self, label: str, pending: PendingRequest, death: EngineDied) -> None:
        self._isolation.note_culprit(label)
        logger.error("request %d kills the engine", pending.request.index)
        failure = Failure(
            code=FailureCode.OUT_OF_MEMORY if death.exhaustion else FailureCode.ENGINE_KILLED,
            message=f"the engine died whenever it had this request alone: {death}",
        )
        if await self._transient_errors.durably(partial(pending.settle, failure)):
            self._settled(pending, failure)

    async def _send_control(self) -> EngineDied | None:
        """Send a control; return the engine's death if the engine died on it."""
        death: BaseException | None = None
        self._hang_watch.begin()
        try:
            async with self._poll.polling():
                await self._access_check.prove_sound(self._latest_endpoint)
        except* EngineDied as deaths:
            death = first_leaf(deaths)
        assert death is None or isinstance(death, EngineDied)
        return death

    def _engine_started(self, identity: EngineInfo) -> None:
        self._access_check.served = identity.models
        self._status.derivation = self.window.begin(identity)
        # The old engine may have died of a probe, whose result then never arrives.
        self._breaker = Breaker(self._policy.breaker)
        self._hang_watch.note_start()
        self._status.enter("feeding", patience_seconds=self._hang_watch.patience_seconds)
        self._started(identity)

    async def _run_window(
        self, requests: Iterator[PendingRequest | TransientError]
    ) -> EngineDied | None:
        """Settle the requests; return the engine's death if that ended the window.

        Raises:
            GpuUnhealthy: Throttling left some of them unanswered.
        """
        all_drawn, death = False, None
        self._hang_watch.begin()
        self.window.note_limits()
        try:
            async with self._poll.polling(), asyncio.TaskGroup() as group:
                while not all_drawn and await self.window.open(self._places_taken):
                    if (pending := next(requests, None)) is None:
                        all_drawn = True
                    elif isinstance(pending, TransientError):
                        await self._transient_errors.wait(pending)
                    else:
                        self._unanswered[pending] = None
                        task = self._tasks[pending] = group.create_task(self._settle(pending))
                        task.add_done_callback(partial(self._ended, pending))
        except* EngineDied as deaths:
            death = first_leaf(deaths)
        assert death is None or isinstance(death, EngineDied)
        stop = self.window.stop
        if stop is not None and (death or self._unanswered or not all_drawn):
            # If the device is unfit, a death of the engine makes no request suspect.
            raise GpuUnhealthy(stop) from death
        return death

    def _places_taken(self) -> int:
        """Return how many places of the window are taken."""
        return len(self._tasks) - self._access_check.held

    def _ended(self, pending: PendingRequest, _: object) -> None:
        del self._tasks[pending]
        self.window.check_again()

    async def _react(self, metrics: EngineMetrics | None) -> None:
        """React to the engine's metrics; None if it did not answer."""
        self._status.engine = metrics
        self.window.follow(metrics, now=asyncio.get_running_loop().time())
        await self._hang_watch.judge(metrics)

    async def _settle(self, pending: PendingRequest) -> None:
        outcome = await self._answer(pending)
        if outcome is None:
            return
        crash_point(CrashPoint.BEFORE_OUTCOME)
        recorded: list[Outcome] = []
        if not await self._transient_errors.durably(
            lambda: recorded.append(pending.settle(outcome))
        ):
            return
        crash_point(CrashPoint.AFTER_OUTCOME)
        del self._unanswered[pending]
        self._settled(pending, *recorded)
        self.window.note_settled()

    async def _answer(self, pending: PendingRequest) -> Outcome | None:
        """Return the outcome; None if no further attempt may be made.

        That is the case if throttling ends the feed, or if the batch is paused or abandoned.
        """
        body = prepare_body(
            pending.request,
            overrides=pending.chunk.overrides,
            served=self._access_check.served,
        )
        asked_again = False
        while await self._may_submit(pending):
            try:
                outcome = await self._submit(pending, body)
            except asyncio.CancelledError:
                self._breaker.note_let_go()
                raise
            if not isinstance(outcome, Failure):
                return outcome
            if is_doubtful(outcome) and not await self._access_check.is_its_own(
                outcome, pending.request.endpoint, body, asked_again=asked_again
            ):
                asked_again = True
                continue
            pending.failed_attempts += 1
            delay = retry_delay(
                outcome,
                attempts=pending.failed_attempts,
                policy=self._policy.retry,
                jitter=random.random(),
                seconds_left=pending.chunk.deadline - time.time(),
            )
            if delay is None:
                return outcome
            await self._transient_errors.durably(partial(pending.fail_attempt, outcome))
            with self.waits.noted(pending, outcome, delay):
                await self._transient_errors.delay(delay, unless=partial(self._is_dropped, pending))
        return None

    async def _submit(self, pending: PendingRequest, body: bytes) -> Outcome | None:
        """Return the outcome; None if the feed ended before the attempt was in the journal."""
        batch_id, index = pending.chunk.batch_id, pending.request.index
        crash_point(CrashPoint.BEFORE_SUBMIT)
        if not await self._transient_errors.durably(pending.submit):
            return None
        crash_point(CrashPoint.AFTER_SUBMIT)
        loop, endpoint = asyncio.get_running_loop(), pending.request.endpoint
        sent_at, self._latest_endpoint = loop.time(), endpoint
        pending.in_flight = True
        outcome = await self._send(
            endpoint, body, request_id=f"{batch_id}-{index}-{pending.submissions}"
        )
        # Not in a `finally`: requests of a dead engine stay marked.
        pending.in_flight = False
        if isinstance(outcome, Completion):
            self._life.deaths.note_answer()
            self._access_check.note_answer(endpoint, body, outcome, sent_at=sent_at)
        failed = isinstance(outcome, Failure) and outcome.retryable
        self._breaker.record(failed=failed, now=loop.time())
        return outcome

    async def _send(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        """Give a request, or a control, to the engine."""
        self._status.in_flight += 1
        try:
            outcome = await self._engine.answer(endpoint, body, request_id=request_id)
        finally:
            self._status.in_flight -= 1
        self._hang_watch.note_progress()
        return outcome

    async def _may_submit(self, pending: PendingRequest) -> bool:
        """Wait until breaker and device permit it; return False if it is permitted no more."""
        loop = asyncio.get_running_loop()
        while self.window.stop is None and not self._is_dropped(pending):
            if not self.window.is_paused and self._breaker.may_submit(loop.time()):
                return True
            if self._breaker.gave_up:
                raise EngineSick(
                    "the engine fails nearly all requests, and failed"
                    f" {self._policy.breaker.probes} probes in a row. Answers so far are kept; the"
                    " batch continues there once the engine works again"
                )
            self._status.note_progress()
            await asyncio.sleep(BREAKER_POLL_SECONDS)
        return False


def first_leaf(error: BaseException) -> BaseException:
    """Return the first exception of a group that is not a group, for the caller to handle."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
