"""Starts the engine of a run, and starts it anew when it died, as long as there is hope in that."""

import logging
from collections.abc import Awaitable, Callable

from batch_orchestration.core.errors import (
    EngineDied,
    EngineError,
    EngineKeepsDying,
    EngineStartFailed,
)
from batch_orchestration.engines.base import Engine, EngineIdentity
from batch_orchestration.inference.faults.isolation import most_deaths
from batch_orchestration.inference.faults.oom_recovery import OomRecovery
from batch_orchestration.inference.window.window import Window
from batch_orchestration.workers.vitals import MARGIN_SECONDS, RunVitals

#: So many deaths without one answer between them, the last one of a control, are no request's;
#: of an engine that has answered something before, one more: chance may kill it now and then.
HOPELESS_DEATHS = 3
#: After so many a control is asked before anything else.
DOUBTFUL_DEATHS = 2


class DeathCount:
    """Counts deaths between two answers.

    Attributes:
        in_a_row: Deaths since the engine answered anything.
        proven: Whether the engine has answered anything since it was started: only then the
            death of it with one request alone says something about that request.
    """

    def __init__(self) -> None:
        self.in_a_row = 0
        self.proven = False
        self._patience = DOUBTFUL_DEATHS
        self._has_answered = False

    @property
    def is_doubtful(self) -> bool:
        """Whether the engine may die of whatever it is asked."""
        return self.in_a_row >= self._patience

    @property
    def is_hopeless(self) -> bool:
        """Whether the engine is to be given up, if it died of a control at last."""
        return self.in_a_row >= HOPELESS_DEATHS + self._has_answered

    def note_start(self) -> None:
        """Take note that the engine was started."""
        self.proven = False

    def note_answer(self) -> None:
        """Take note that a request was answered."""
        self.in_a_row, self.proven, self._patience = 0, True, DOUBTFUL_DEATHS
        self._has_answered = True

    def note_control(self, *, within: int) -> None:
        """Take note that a control was answered: the search may go on to its end without another.

        Args:
            within: How many deaths that takes at most.
        """
        self.note_answer()
        self._patience = max(DOUBTFUL_DEATHS, within)

    def note_death(self) -> None:
        """Take note that it died, of something else than want of memory that can be helped."""
        self.in_a_row += 1


logger = logging.getLogger(__name__)


class EngineLife:
    """The engine from its start to its death, again and again.

    An engine that dies repeatedly without one answer is asked a control request before anything
    else; one that dies of controls, too, is given up.

    Args:
        begun: Told of each engine that is ready.
        control: Asks a control; returns the engine's death, if that was the answer.
        suspects: How many requests are suspect now, for messages.

    Attributes:
        easing: What is done about an engine that runs out of memory.
        deaths: Of this run; told of each answer.
        restarts: Of this run.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        window: Window,
        vitals: RunVitals,
        begun: Callable[[EngineIdentity], None],
        control: Callable[[], Awaitable[EngineDied | None]],
        suspects: Callable[[], int],
    ) -> None:
        self._engine = engine
        self._window = window
        self._vitals = vitals
        self._begun = begun
        self._control = control
        self._suspects = suspects
        self.oom_recovery = OomRecovery(engine.fallback, in_flight=window.most)
        self.deaths = DeathCount()
        self.restarts = 0

    async def start(self) -> None:
        """Start the engine, on a gentler rung if its memory does not suffice.

        Raises:
            EngineStartFailed: It did not become ready.
            EngineRefusesUs: It does not let us in.
            EngineDied: It needed more restarts than it may have.
        """
        while True:
            self._vitals.enter(
                "starting engine",
                patience_seconds=self._window.start_timeout_seconds + MARGIN_SECONDS,
            )
            try:
                identity = await self._engine.start()
            except EngineStartFailed as failure:
                if not await self.oom_recovery.ease(failure):
                    raise
                self._count_restart(failure)
            else:
                self.deaths.note_start()
                return self._begun(identity)

    async def ease(self, death: EngineDied) -> bool:
        """Make things easier for an engine that ran out of memory; return whether that may help.

        If not, the death counts.
        """
        if await self.oom_recovery.ease(death):
            return True
        self.deaths.note_death()
        return False

    async def restart(self, death: EngineDied) -> bool:
        """Start it anew; if it has died again and again, see first whether it answers at all.

        Returns:
            Whether the engine runs that was started first; not, if that died of a control.

        Raises:
            EngineKeepsDying: It dies whatever it is asked.
            EngineDied: It has died more often than it may be restarted.
        """
        self._count_restart(death)
        await self.start()
        return await self.prove_sound() if self.deaths.is_doubtful else True

    @property
    def may_restart(self) -> bool:
        """Whether the engine may be started anew once more."""
        return self.restarts < self._window.engine_restarts

    async def prove_sound(self) -> bool:
        """Have the engine answer a control, unless it has answered anything yet.

        Returns:
            As `restart`; raises as that does.
        """
        if self.deaths.proven:
            return True
        before = self.restarts
        while (death := await self._control()) is not None:
            if not await self.ease(death) and self.deaths.is_hopeless:
                raise EngineKeepsDying(
                    f"the engine dies whatever it is asked: {self.deaths.in_a_row} times in a row"
                    " without one answer, at last of a control request; no request is to blame,"
                    f" and what was answered is kept. Last death: {death}"
                ) from death
            self._count_restart(death)
            await self.start()
        self.deaths.note_control(within=most_deaths(self._window.most))
        return self.restarts == before

    def _count_restart(self, death: EngineError) -> None:
        self.restarts += 1
        self._vitals.restarts += 1
        if self.restarts > self._window.engine_restarts:
            raise EngineDied(
                f"the engine died {self.restarts} times in this run and may be restarted"
                f" {self._window.engine_restarts} times (BATCH_ENGINE_RESTARTS);"
                f" {self._suspects()} requests are suspect, the next run goes on with them."
                f" Last death: {death}"
            ) from death
        logger.warning("restart %d of %d", self.restarts, self._window.engine_restarts)
