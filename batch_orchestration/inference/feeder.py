"""Keeps the engine busy: a bounded window of requests in flight, which spans chunks."""

import asyncio
import logging
import math
import random
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import EngineDied, EngineSick, GpuUnhealthy
from batch_orchestration.core.outcomes import Completion, Failure, FailureCode, Outcome
from batch_orchestration.core.requests import Overrides, prepare_body
from batch_orchestration.engines.access import CHAT, is_doubtful
from batch_orchestration.engines.base import Engine, EngineInfo
from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.gpu.thermal import Throttle
from batch_orchestration.inference.chunk_pass import PendingRequest, TransientError
from batch_orchestration.inference.faults.access import AccessCheck
from batch_orchestration.inference.faults.engine_life import EngineLife
from batch_orchestration.inference.faults.hang_watch import LOOKS_PER_LIMIT, HangWatch
from batch_orchestration.inference.faults.isolation import LABEL_END, Isolation, to_confirm
from batch_orchestration.inference.faults.retries import Breaker, retry_delay
from batch_orchestration.inference.faults.transient_errors import TransientErrors
from batch_orchestration.inference.open_files import connections_possible
from batch_orchestration.inference.waiting import EngineWaits
from batch_orchestration.inference.window.window import EnginePoll, RequestWindow, Window
from batch_orchestration.workers.vitals import MARGIN_SECONDS, RunVitals

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
        engine: Engine,
        source: Iterator[PendingRequest | TransientError],
        *,
        window: Window,
        overrides: Callable[[PendingRequest], Overrides],
        settled: Callable[[PendingRequest, Outcome], None],
        started: Callable[[EngineInfo], None] = lambda identity: None,
        vitals: RunVitals | None = None,
        throttle: Callable[[], Throttle] = Throttle,
        deadline: Callable[[PendingRequest], float] = lambda pending: math.inf,
    ) -> None:
        self._vitals = vitals or RunVitals()
        self._engine = engine
        self._source = source
        self._window = window
        self._overrides = overrides
        self._deadline = deadline
        self._settled = settled
        self._started = started
        self._served: tuple[str, ...] = ()
        self._life = self._new_life()
        self._breaker = Breaker(window.breaker)
        self._hang_watch = HangWatch(engine, floor_seconds=window.hang_seconds, moved=self._moved)
        looks = window.hang_seconds / LOOKS_PER_LIMIT
        self._poll = EnginePoll(engine, heard=self._heard, most_seconds=looks)
        waited = self._vitals.note_progress
        self._room = RequestWindow(
            window, most=self._most_in_flight, throttle=throttle, waited=waited
        )
        self._gate = self._new_gate()
        #: Endpoint of the latest submission, for controls before the first answer.
        self._asked_at = CHAT
        self._isolation: Isolation[PendingRequest] = Isolation()
        #: Drawn from the source and still without an outcome, in the order of drawing.
        self._unanswered: dict[PendingRequest, None] = {}
        #: Requests that a dead engine left unanswered and that are not suspect.
        self._again: deque[PendingRequest] = deque()
        #: Requests that are being answered now.
        self._tasks: dict[PendingRequest, asyncio.Task[None]] = {}
        self._abandoned: set[str] = set()
        self._halted: set[str] = set()
        self._source_is_dry = False
        self._obstacles = TransientErrors(
            waited=waited, is_over=lambda: self._room.stop is not None
        )
        #: Waits that the engine asked for.
        self.waits = EngineWaits()
        self.in_flight = 0

    def _new_life(self) -> EngineLife:
        return EngineLife(
            self._engine,
            window=self._window,
            vitals=self._vitals,
            begun=self._begun,
            control=self._control,
            suspects=lambda: len(self._isolation),
        )

    def _new_gate(self) -> AccessCheck:
        return AccessCheck(
            self._ask,
            served=lambda: self._served,
            where=self._engine.name,
            retry=self._window.retry,
            pause=self._delay,
            freed=self._room.look_again,
        )

    @property
    def is_dry(self) -> bool:
        """Whether nothing is left to give to the engine."""
        return self._fresh_is_over and not self._isolation

    def note_window(self) -> None:
        """Record the present width of the window in the vitals."""
        self._vitals.window, self._vitals.unheld_window = self._room.limit, self._room.unheld

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
            if self._isolation and (self._fresh_is_over or not self._wants_proof):
                began = loop.time()
                if self._wants_proof:
                    await self._life.prove_sound()
                await self._run_turn_of_suspects(*self._isolation.next_group())
                suspects_took = loop.time() - began
            await self._run_turn_of_fresh(loop.time() + suspects_took)

    @property
    def _wants_proof(self) -> bool:
        """Whether the engine has to answer something before the next suspect is tested.

        If another restart is allowed, it has to do so after the suspect's death instead. The proof
        is needed because an engine worn out by one request dies with the next one, whichever it is.
        A fresh request is as good a proof as a control, and costs nothing.
        """
        last_chance = self._isolation.may_convict and not self._life.may_restart
        return last_chance and not self._life.deaths.proven

    def abandon(self, batch_id: str) -> bool:
        """Let go of a batch's drawn requests; return whether none of them is being answered.

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

    def _is_let_go(self, pending: PendingRequest) -> bool:
        return pending.chunk.batch_id in self._abandoned | self._halted

    def _still_asked(self, requests: Iterable[PendingRequest]) -> list[PendingRequest]:
        return [pending for pending in requests if not self._is_let_go(pending)]

    @property
    def _fresh_is_over(self) -> bool:
        return self._source_is_dry and not self._again

    def _fresh(self, until: float) -> Iterator[PendingRequest | TransientError]:
        """Yield fresh requests to the end, or, while suspects wait, until the time `until`."""
        loop = asyncio.get_running_loop()
        while not self._isolation or self._wants_proof or loop.time() < until:
            if self._again:
                if not self._is_let_go(again := self._again.popleft()):
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
        left, self._unanswered = self._still_asked(self._unanswered), {}
        suspects = [pending for pending in left if pending.in_flight]
        if await self._life.ease(death):
            self._again.extend(left)
        else:
            self._again.extend(pending for pending in left if not pending.in_flight)
            logger.warning("%d requests were in flight and are suspect: %s", len(suspects), death)
            label = f"{secrets.token_hex(4)}{LABEL_END}"
            await self._suspect(label if len(suspects) > 1 else to_confirm(label), suspects)
        for pending in left:
            pending.in_flight = False
        await self._life.restart(death)

    async def _run_turn_of_suspects(self, label: str, group: list[PendingRequest]) -> None:
        group = self._still_asked(group)
        logger.info("testing %d suspects apart (group %s)", len(group), label)
        untested = iter(group)
        was_proven, death = self._life.deaths.proven, await self._run_window(untested)
        if death is None:
            self._isolation.note_answered(label)
            return
        left = self._still_asked([*self._unanswered, *untested])
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
            self._life.oom_recovery.note_culprit()
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
            await self._obstacles.durably(partial(pending.suspect, group))
            crash_point(CrashPoint.AFTER_SUSPECT)

    async def _convict(self, label: str, pending: PendingRequest, death: EngineDied) -> None:
        self._isolation.note_culprit(label)
        logger.error("request %d kills the engine", pending.request.index)
        failure = Failure(
            code=FailureCode.OUT_OF_MEMORY if death.exhaustion else FailureCode.ENGINE_KILLED,
            message=f"the engine died whenever it had this request alone: {death}",
        )
        if await self._obstacles.durably(partial(pending.settle, failure)):
            self._settled(pending, failure)

    async def _control(self) -> EngineDied | None:
        """Ask a control; return the engine's death if the engine died on it."""
        death: BaseException | None = None
        self._hang_watch.begin()
        try:
            async with self._poll.polling():
                await self._gate.prove_sound(self._asked_at)
        except* EngineDied as deaths:
            death = first_leaf(deaths)
        assert death is None or isinstance(death, EngineDied)
        return death

    def _begun(self, engine: EngineInfo) -> None:
        """Begin with an engine that has just been started."""
        self._served = engine.models
        self._vitals.derivation = self._room.begin(engine)
        # The old engine may have died of a probe, whose result then never arrives.
        self._breaker = Breaker(self._window.breaker)
        self._hang_watch.note_start()
        self._vitals.enter("feeding", patience_seconds=self._patience_seconds)
        self._started(engine)

    @property
    def _patience_seconds(self) -> float:
        """Time without progress that is only slow; `HangWatch` ends a stuck engine earlier."""
        return self._hang_watch.limit_seconds + MARGIN_SECONDS

    def _most_in_flight(self) -> int:
        return min(self._life.oom_recovery.in_flight, connections_possible())

    def _moved(self) -> None:
        self._vitals.patience_seconds = self._patience_seconds
        self._vitals.note_progress()

    async def _run_window(
        self, requests: Iterator[PendingRequest | TransientError]
    ) -> EngineDied | None:
        """Settle the requests; return the engine's death if that ended the window.

        Raises:
            GpuUnhealthy: Throttling left some of them unanswered.
        """
        all_drawn, death = False, None
        self._hang_watch.begin()
        self.note_window()
        try:
            async with self._poll.polling(), asyncio.TaskGroup() as group:
                while not all_drawn and await self._room.open(self._taken):
                    if (pending := next(requests, None)) is None:
                        all_drawn = True
                    elif isinstance(pending, TransientError):
                        await self._obstacles.wait(pending)
                    else:
                        self._unanswered[pending] = None
                        task = self._tasks[pending] = group.create_task(self._settle(pending))
                        task.add_done_callback(partial(self._ended, pending))
        except* EngineDied as deaths:
            death = first_leaf(deaths)
        assert death is None or isinstance(death, EngineDied)
        stop = self._room.stop
        if stop is not None and (death or self._unanswered or not all_drawn):
            # If the device is unfit, a death of the engine makes no request suspect.
            raise GpuUnhealthy(stop) from death
        return death

    def _taken(self) -> int:
        """Return how many places of the window are taken."""
        return len(self._tasks) - self._gate.held

    def _ended(self, pending: PendingRequest, _: object) -> None:
        del self._tasks[pending]
        self._room.look_again()

    async def _heard(self, figures: EngineMetrics | None) -> None:
        """React to the engine's metrics; None if it did not answer."""
        self._vitals.engine = figures
        now = asyncio.get_running_loop().time()
        self._room.hear(figures, in_flight=self.in_flight, now=now)
        self.note_window()
        await self._hang_watch.judge(figures, in_flight=self.in_flight)

    async def _settle(self, pending: PendingRequest) -> None:
        outcome = await self._answer(pending)
        if outcome is None:
            return
        crash_point(CrashPoint.BEFORE_OUTCOME)
        recorded: list[Outcome] = []
        if not await self._obstacles.durably(lambda: recorded.append(pending.settle(outcome))):
            return
        crash_point(CrashPoint.AFTER_OUTCOME)
        del self._unanswered[pending]
        self._settled(pending, *recorded)
        self._room.note_settled()

    async def _answer(self, pending: PendingRequest) -> Outcome | None:
        """Return the outcome; None if no further attempt may be made.

        That is the case if throttling ends the feed, or if the batch is paused or abandoned.
        """
        body = prepare_body(
            pending.request, overrides=self._overrides(pending), served=self._served
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
            if is_doubtful(outcome) and not await self._gate.is_its_own(
                outcome, pending.request.endpoint, body, asked_again=asked_again
            ):
                asked_again = True
                continue
            pending.failed_attempts += 1
            delay = retry_delay(
                outcome,
                attempts=pending.failed_attempts,
                policy=self._window.retry,
                jitter=random.random(),
                seconds_left=self._deadline(pending) - time.time(),
            )
            if delay is None:
                return outcome
            await self._obstacles.durably(partial(pending.fail_attempt, outcome))
            with self.waits.noted(pending, outcome, delay):
                await self._obstacles.delay(delay, unless=partial(self._is_let_go, pending))
        return None

    async def _submit(self, pending: PendingRequest, body: bytes) -> Outcome | None:
        """Return the outcome; None if the feed ended before the attempt was in the journal."""
        batch_id, index = pending.chunk.batch_id, pending.request.index
        crash_point(CrashPoint.BEFORE_SUBMIT)
        if not await self._obstacles.durably(pending.submit):
            return None
        crash_point(CrashPoint.AFTER_SUBMIT)
        loop, endpoint = asyncio.get_running_loop(), pending.request.endpoint
        given_at, self._asked_at = loop.time(), endpoint
        pending.in_flight = True
        outcome = await self._ask(
            endpoint, body, request_id=f"{batch_id}-{index}-{pending.submissions}"
        )
        # Not in a `finally`: requests of a dead engine stay marked.
        pending.in_flight = False
        if isinstance(outcome, Completion):
            self._life.deaths.note_answer()
            self._gate.note_answer(endpoint, body, outcome, given_at=given_at)
        failed = isinstance(outcome, Failure) and outcome.retryable
        self._breaker.record(failed=failed, now=loop.time())
        return outcome

    async def _ask(self, endpoint: str, body: bytes, *, request_id: str) -> Outcome:
        """Give a request, or a control, to the engine."""
        self.in_flight += 1
        self._vitals.in_flight = self.in_flight
        try:
            outcome = await self._engine.answer(endpoint, body, request_id=request_id)
        finally:
            self.in_flight -= 1
            self._vitals.in_flight = self.in_flight
        self._hang_watch.note_progress()
        return outcome

    async def _delay(self, seconds: float) -> None:
        await self._obstacles.delay(seconds)

    async def _may_submit(self, pending: PendingRequest) -> bool:
        """Wait until breaker and device permit it; return False if it is permitted no more."""
        loop = asyncio.get_running_loop()
        while self._room.stop is None and not self._is_let_go(pending):
            if not self._room.is_paused and self._breaker.may_submit(loop.time()):
                return True
            if self._breaker.gave_up:
                raise EngineSick(
                    "the engine fails nearly everything it is given, and failed"
                    f" {self._window.breaker.probes} probes in a row; what was answered is kept,"
                    " and the batch goes on where it stopped once the engine is well"
                )
            self._vitals.note_progress()
            await asyncio.sleep(BREAKER_POLL_SECONDS)
        return False


def first_leaf(error: BaseException) -> BaseException:
    """Return the first exception of a group that is not a group, for the caller to handle."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
