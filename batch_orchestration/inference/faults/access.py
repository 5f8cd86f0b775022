"""Decides whose a refusal is: the request's own, or that of a gate which lets nothing through.

Nothing is recorded about a refused request before something that was given to the engine *after*
the refusal was let in: another request, or a control. One control speaks for all refusals before
it. If the control is refused too, the run ends, and no request has paid.

A control that is let in does not prove that the gate was open when the request was refused: it may
have opened since. So the request is asked once more, and only a second refusal is its own. Once
that is known, further refusals like it are only held back until the next proof, and give up their
place in the window for so long: a thousand refusals by a content filter cost a few controls.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import msgspec

from batch_orchestration.core.crash_points import CrashPoint, crash_point
from batch_orchestration.core.errors import EngineRefusesUs, EngineSick
from batch_orchestration.core.outcomes import Completion, Failure, Outcome
from batch_orchestration.engines.access import (
    Control,
    first_line,
    is_of_the_endpoint,
    kind_of,
    lets_in,
    one_token_probes,
)
from batch_orchestration.inference.faults.retries import RetryPolicy, retry_delay

#: A longer body is never a control: it would be kept, and cost as much again.
LONGEST_BODY = 64 * 2**10


class _Named(msgspec.Struct):
    model: str | None = None


_decode = msgspec.json.Decoder(_Named).decode


class Controls:
    """Keeps, of each endpoint and model, the request whose answer cost least."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str | None], tuple[int, Control]] = {}
        self._latest: Control | None = None

    def note_answer(self, endpoint: str, body: bytes, completion: Completion) -> None:
        """Take note of a request that was answered."""
        if len(body) > LONGEST_BODY:
            return
        control = Control(endpoint=endpoint, body=body, model=_model(body))
        # Four bytes are about a token; a token that is generated costs more than one that is read.
        cost = 4 * completion.usage.completion_tokens + len(body) // 4
        key = endpoint, control.model
        if key not in self._kept or cost < self._kept[key][0]:
            self._kept[key] = cost, control
        self._latest = self._kept[key][1]

    def like(self, endpoint: str, body: bytes, *, served: tuple[str, ...]) -> list[Control]:
        """Return what to ask in place of a request, best first.

        What was answered before, of the same endpoint and model, or else of others; while
        nothing was, one-token probes of the model that the engine serves.

        Args:
            served: Models that the engine names.
        """
        kept = self._kept.get((endpoint, _model(body)))
        if kept is not None:
            return [kept[1]]
        return self.any(endpoint, served=served)

    def any(self, endpoint: str, *, served: tuple[str, ...]) -> list[Control]:
        """The same, where it does not matter which model is asked."""
        if self._latest is not None:
            return [self._latest]
        return one_token_probes(endpoint, next(iter(served), None))


def _model(body: bytes) -> str | None:
    """Return the model that a body names; bodies were decoded before, so this one can be."""
    try:
        return _decode(body).model
    except (msgspec.DecodeError, RecursionError):  # it names something that is no name
        return None


logger = logging.getLogger(__name__)
#: So long a refusal of a known kind waits for a proof that costs nothing.
PATIENCE_SECONDS = 1.0
#: Beyond so many, or so many bytes, what is held back keeps its place in the window.
MOST_HELD, MOST_HELD_BYTES = 256, 16 * 2**20
#: Of refusals that are known to be the requests' own.
MOST_KINDS = 64


class Ask(Protocol):
    """Gives a control to the engine."""

    def __call__(self, endpoint: str, body: bytes, *, request_id: str) -> Awaitable[Outcome]:
        """Return the outcome; raise `EngineDied`."""


class AccessCheck:
    """What is known of the gate in one run.

    Args:
        ask: Gives a control to the engine.
        served: Models that the engine names.
        where: Its address, for messages.
        retry: How often a control is sent again that meets the engine's own trouble.
        pause: Waits so many seconds before that.
        freed: Told when a place in the window is given up.

    Attributes:
        held: Refused requests that wait for a proof and take no place in the window.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        served: Callable[[], tuple[str, ...]],
        where: str,
        retry: RetryPolicy,
        pause: Callable[[float], Awaitable[None]],
        freed: Callable[[], None],
    ) -> None:
        self._ask = ask
        self._served = served
        self._where = where
        self._retry = retry
        self._pause = pause
        self._freed = freed
        self._controls = Controls()
        self._asking = asyncio.Lock()
        #: When what was let in had been given to the engine, latest.
        self._open_at = float("-inf")
        self._proof = asyncio.Event()
        self._own_kinds: set[tuple[int, str]] = set()
        self._asked = 0
        self.held = 0
        self._held_bytes = 0

    def note_answer(
        self, endpoint: str, body: bytes, completion: Completion, *, given_at: float
    ) -> None:
        """Take note of an answer, and when its request was given to the engine."""
        self._controls.note_answer(endpoint, body, completion)
        self._note_open(given_at)

    async def is_its_own(
        self, refusal: Failure, endpoint: str, body: bytes, *, asked_again: bool
    ) -> bool:
        """Return whether a doubtful refusal is the request's own; if not, it is to be asked again.

        Args:
            asked_again: Whether this refusal is the second one.

        Raises:
            EngineRefusesUs: A control was refused, too.
            EngineSick: No control could be asked.
            EngineDied: The engine died of whatever it had.
        """
        since = asyncio.get_running_loop().time()
        kind = kind_of(refusal)
        known = kind in self._own_kinds
        if known:
            await self._hold(since, len(body))
        async with self._asking:
            if self._open_at < since:
                logger.info("HTTP %s may be the gate's; asking a control", refusal.status)
                await self._prove(self._controls.like(endpoint, body, served=self._served()))
        if asked_again and kind is not None and len(self._own_kinds) < MOST_KINDS:
            self._own_kinds.add(kind)
        return known or asked_again

    async def prove_sound(self, endpoint: str) -> None:
        """Ask a control, to see whether the engine answers anything at all; raises as above."""
        async with self._asking:
            await self._prove(self._controls.any(endpoint, served=self._served()))

    async def _hold(self, since: float, size: int) -> None:
        """Wait a moment for a proof that is younger."""
        if self.held == MOST_HELD or self._held_bytes + size > MOST_HELD_BYTES:
            return
        self.held += 1
        self._held_bytes += size
        self._freed()
        if self.held == MOST_HELD:
            self._wake()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    while self._open_at < since and self.held < MOST_HELD:
                        await self._proof.wait()
        finally:
            self.held -= 1
            self._held_bytes -= size

    def _note_open(self, given_at: float) -> None:
        if given_at > self._open_at:
            self._open_at = given_at
        self._wake()

    def _wake(self) -> None:
        proof, self._proof = self._proof, asyncio.Event()
        proof.set()

    async def _prove(self, controls: Sequence[Control]) -> None:
        attempts = 0
        while True:
            given_at = asyncio.get_running_loop().time()
            control, outcome = await self._first_that_may(controls)
            if lets_in(outcome):
                return self._note_open(given_at)
            assert isinstance(outcome, Failure)
            if not outcome.retryable:
                raise self._refused(control, outcome)
            attempts += 1
            delay = retry_delay(
                outcome, attempts=attempts, policy=self._retry, jitter=random.random()
            )
            if delay is None:
                raise EngineSick(
                    f"{self._where} answers not even a control request: {outcome.message};"
                    " nothing was recorded about what it refused"
                )
            await self._pause(delay)

    async def _first_that_may(self, controls: Sequence[Control]) -> tuple[Control, Outcome]:
        """Ask one control after the other, as long as only its endpoint is refused.

        Returns:
            The one that was answered, or else the first one, with its outcome.
        """
        asked: list[tuple[Control, Outcome]] = []
        for control in controls:
            self._asked += 1
            crash_point(CrashPoint.BEFORE_CONTROL)
            outcome = await self._ask(
                control.endpoint, control.body, request_id=f"control-{self._asked}"
            )
            crash_point(CrashPoint.AFTER_CONTROL)
            asked.append((control, outcome))
            if isinstance(outcome, Completion):
                self._controls.note_answer(control.endpoint, control.body, outcome)
            if lets_in(outcome):
                return asked[-1]
            if not (isinstance(outcome, Failure) and is_of_the_endpoint(outcome)):
                break
        return asked[0]

    def _refused(self, control: Control, said: Failure) -> EngineRefusesUs:
        line = first_line(said.message)
        return EngineRefusesUs(
            f"{self._where} does not let us in: a control request at {control.endpoint} was"
            f" answered HTTP {said.status}: {line}; no request has paid for it",
            page=control.endpoint,
            model=control.model,
            status=said.status,
            line=line,
        )
