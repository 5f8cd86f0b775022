"""Starts the engine of a run, and restarts it after a death while a restart may help."""

import logging
from collections.abc import Awaitable, Callable

from batch_orchestration.core.errors import (
    EngineDied,
    EngineError,
    EngineKeepsDying,
    EngineStartFailed,
)
from batch_orchestration.engines.base import Engine, EngineInfo
from batch_orchestration.inference.chunk_pass import PendingRequest
from batch_orchestration.inference.faults.isolation import Isolation, most_deaths
from batch_orchestration.inference.faults.oom_recovery import OomRecovery
from batch_orchestration.inference.policy import RunPolicy
from batch_orchestration.workers.run_status import MARGIN_SECONDS, RunStatus

logger = logging.getLogger(__name__)

#: After this many deaths without an answer, the last one on a control, no request is to blame. An
#: engine that has answered before is allowed one more, because it may die by chance now and then.
HOPELESS_DEATHS = 3
#: After this many deaths a control is asked before anything else.
DOUBTFUL_DEATHS = 2


class DeathCount:
    """Counts deaths between two answers.

    Attributes:
        in_a_row: Deaths since the latest answer.
        proven: Whether the engine has answered since its latest start. Only then does a death with
            a single request count against that request.
    """

    def __init__(self) -> None:
        self.in_a_row = 0
        self.proven = False
        self._patience = DOUBTFUL_DEATHS
        self._has_answered = False

    @property
    def is_doubtful(self) -> bool:
        """Whether the engine may be dying regardless of its requests."""
        return self.in_a_row >= self._patience

    @property
    def is_hopeless(self) -> bool:
        """Whether to give the engine up if its latest death was on a control."""
        return self.in_a_row >= HOPELESS_DEATHS + self._has_answered

    def note_start(self) -> None:
        """Record that the engine was started."""
        self.proven = False

    def note_answer(self) -> None:
        """Record that a request was answered."""
        self.in_a_row, self.proven, self._patience = 0, True, DOUBTFUL_DEATHS
        self._has_answered = True

    def note_control(self, *, within: int) -> None:
        """Record that a control was answered, so that the search may finish without another one.

        Args:
            within: The most deaths that the search takes.
        """
        self.note_answer()
        self._patience = max(DOUBTFUL_DEATHS, within)

    def note_death(self) -> None:
        """Record a death that no lower memory level can prevent."""
        self.in_a_row += 1


class EngineLife:
    """The engine of a run through all of its starts and deaths.

    An engine that dies repeatedly without an answer is sent a control before anything else. An
    engine that dies on controls, too, is given up.

    Args:
        memory: Handles engines that run out of memory.
        isolation: The suspects, for messages.
        started: Called with each engine that is ready.
        control: Sends a control; returns the engine's death if the engine died on it.

    Attributes:
        deaths: Deaths in this run; the caller records each answer there.
        restarts: Restarts in this run.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        policy: RunPolicy,
        status: RunStatus,
        memory: OomRecovery,
        isolation: Isolation[PendingRequest],
        started: Callable[[EngineInfo], None],
        control: Callable[[], Awaitable[EngineDied | None]],
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._status = status
        self._memory = memory
        self._isolation = isolation
        self._started = started
        self._control = control
        self.deaths = DeathCount()
        self.restarts = 0

    async def start(self) -> None:
        """Start the engine, at a lower memory level if its memory does not suffice.

        Raises:
            EngineStartFailed: The engine did not become ready.
            EngineRefusesUs: The engine refuses access.
            EngineDied: The limit of restarts is exceeded.
        """
        while True:
            self._status.enter(
                "starting engine",
                patience_seconds=self._policy.start_timeout_seconds + MARGIN_SECONDS,
            )
            try:
                identity = await self._engine.start()
            except EngineStartFailed as failure:
                if not await self._memory.ease(failure):
                    raise
                self._count_restart(failure)
            else:
                self.deaths.note_start()
                return self._started(identity)

    async def ease(self, death: EngineDied) -> bool:
        """Reduce the engine's memory use if it ran out of memory; return whether that may help.

        True as well if somebody else ended the engine. Otherwise the death is counted.
        """
        if death.deliberate or await self._memory.ease(death):
            return True
        self.deaths.note_death()
        return False

    async def restart(self, death: EngineDied) -> bool:
        """Restart the engine; after repeated deaths, check first whether it answers at all.

        Returns:
            Whether the engine started first still runs; False if it died on a control.

        Raises:
            EngineKeepsDying: The engine dies on controls, too.
            EngineDied: The limit of restarts is exceeded.
        """
        self._count_restart(death)
        await self.start()
        return await self.prove_sound() if self.deaths.is_doubtful else True

    @property
    def may_restart(self) -> bool:
        """Whether the limit allows another restart."""
        return self.restarts < self._policy.engine_restarts

    async def prove_sound(self) -> bool:
        """Have the engine answer a control, unless it has answered since its start.

        Returns:
            As `restart`, which also documents the errors.
        """
        if self.deaths.proven:
            return True
        before = self.restarts
        while (death := await self._control()) is not None:
            if not await self.ease(death) and self.deaths.is_hopeless:
                raise EngineKeepsDying(
                    f"the engine died {self.deaths.in_a_row} times in a row without one answer, the"
                    " last time on a control request, so no request is to blame. Answers so far"
                    f" are kept. Last death: {death}"
                ) from death
            self._count_restart(death)
            await self.start()
        self.deaths.note_control(within=most_deaths(self._policy.most_in_flight))
        return self.restarts == before

    def _count_restart(self, death: EngineError) -> None:
        self.restarts += 1
        self._status.restarts += 1
        if self.restarts > self._policy.engine_restarts:
            raise EngineDied(
                f"the engine died {self.restarts} times in this run and may be restarted"
                f" {self._policy.engine_restarts} times (BATCH_ENGINE_RESTARTS);"
                f" {len(self._isolation)} requests are suspect; the next run tests them."
                f" Last death: {death}"
            ) from death
        logger.warning("restart %d of %d", self.restarts, self._policy.engine_restarts)
