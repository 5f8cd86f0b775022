"""Decides whether a refusal concerns one request or everything; keeps controls to find that out.

"The gate" is whatever refuses everything: a proxy, a missing key, a quota.

A refusal is recorded only after the engine let in something that it was given *after* the refusal:
another request, or a control. One control settles all refusals before it. If the control is refused
too, the run ends, and no request has paid for it.

A control that is let in does not prove that the gate was open when the request was refused, because
it may have opened since. The request is therefore asked once more, and only a second refusal counts
as its own. Once a kind of refusal is known to be the requests' own, further refusals of that kind
are only held until the next proof, and give up their place in the window meanwhile. A thousand
refusals by a content filter thus cost only a few controls.
"""

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Sequence
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
from batch_orchestration.inference.faults.transient_errors import TransientErrors
from batch_orchestration.inference.window.window import RequestWindow

logger = logging.getLogger(__name__)

#: Longer bodies never become controls: they would stay in memory and cost as much again.
LONGEST_BODY = 64 * 2**10
#: How long a refusal of a known kind waits for a proof that costs nothing.
PATIENCE_SECONDS = 1.0
#: Beyond this number of requests or bytes, held requests keep their place in the window.
MOST_HELD, MOST_HELD_BYTES = 256, 16 * 2**20
#: How many kinds of refusal are remembered as the requests' own.
MOST_KINDS = 64


class _Named(msgspec.Struct):
    model: str | None = None


_decode = msgspec.json.Decoder(_Named).decode


class Controls:
    """Keeps the cheapest answered request of each endpoint and model, for use as a control."""

    def __init__(self) -> None:
        self._cheapest: dict[tuple[str, str | None], tuple[int, Control]] = {}
        self._latest: Control | None = None

    def note_answer(self, endpoint: str, body: bytes, completion: Completion) -> None:
        """Record an answered request, and keep it if it is the cheapest of its kind."""
        if len(body) > LONGEST_BODY:
            return
        control = Control(endpoint=endpoint, body=body, model=_model(body))
        # About four bytes are a token; a generated token costs more than a prompt token.
        cost = 4 * completion.usage.completion_tokens + len(body) // 4
        key = endpoint, control.model
        if key not in self._cheapest or cost < self._cheapest[key][0]:
            self._cheapest[key] = cost, control
        self._latest = self._cheapest[key][1]

    def like(self, endpoint: str, body: bytes, *, served: tuple[str, ...]) -> list[Control]:
        """Return the controls to ask in place of a request, best first.

        These are the cheapest answered request of the same endpoint and model, or else that of the
        latest answer. Before the first answer, they are one-token probes of the served model.

        Args:
            served: Models that the engine lists.
        """
        cheapest = self._cheapest.get((endpoint, _model(body)))
        if cheapest is not None:
            return [cheapest[1]]
        return self.any(endpoint, served=served)

    def any(self, endpoint: str, *, served: tuple[str, ...]) -> list[Control]:
        """Return the controls for an endpoint if any model will do; see `like`."""
        if self._latest is not None:
            return [self._latest]
        return one_token_probes(endpoint, next(iter(served), None))


def _model(body: bytes) -> str | None:
    """Return the model that a body names. The body has been decoded before, so it is valid JSON."""
    try:
        return _decode(body).model
    except (msgspec.DecodeError, RecursionError):  # the name is not a string
        return None


class Send(Protocol):
    """Sends a control to the engine."""

    def __call__(self, endpoint: str, body: bytes, *, request_id: str) -> Awaitable[Outcome]:
        """Return the outcome, or raise `EngineDied`."""


class AccessCheck:
    """The state of the gate, as far as one run knows it.

    Args:
        where: Address of the engine, for messages.
        retry: When to send a control again after a retryable failure.
        window: Requests give up their places in it while they are held.

    Attributes:
        served: Models that the engine lists; set by the feeder.
        held: Refused requests that wait for a proof outside the window.
    """

    def __init__(
        self,
        send: Send,
        *,
        where: str,
        retry: RetryPolicy,
        window: RequestWindow,
        transient_errors: TransientErrors,
    ) -> None:
        self.served: tuple[str, ...] = ()
        self._send = send
        self._where = where
        self._retry = retry
        self._window = window
        self._transient_errors = transient_errors
        self._controls = Controls()
        self._asking = asyncio.Lock()
        #: Latest time at which the engine was given something that it let in.
        self._open_at = float("-inf")
        self._proof = asyncio.Event()
        self._own_kinds: set[tuple[int, str]] = set()
        self._asked = 0
        self.held = 0
        self._held_bytes = 0

    def note_answer(
        self, endpoint: str, body: bytes, completion: Completion, *, sent_at: float
    ) -> None:
        """Record an answer, and the time at which the engine was given its request."""
        self._controls.note_answer(endpoint, body, completion)
        self._note_open(sent_at)

    async def is_its_own(
        self, refusal: Failure, endpoint: str, body: bytes, *, asked_again: bool
    ) -> bool:
        """Return whether a doubtful refusal is the request's own; if not, ask the request again.

        Args:
            asked_again: Whether this is the request's second refusal.

        Raises:
            EngineRefusesUs: A control was refused, too.
            EngineSick: No control was answered.
            EngineDied: The engine died meanwhile.
        """
        since = asyncio.get_running_loop().time()
        kind = kind_of(refusal)
        known = kind in self._own_kinds
        if known:
            await self._hold(since, len(body))
        async with self._asking:
            if self._open_at < since:
                logger.info("HTTP %s may concern everything; sending a control", refusal.status)
                await self._prove(self._controls.like(endpoint, body, served=self.served))
        if asked_again and kind is not None and len(self._own_kinds) < MOST_KINDS:
            self._own_kinds.add(kind)
        return known or asked_again

    async def prove_sound(self, endpoint: str) -> None:
        """Check with a control that the engine answers at all; raises like `is_its_own`."""
        async with self._asking:
            await self._prove(self._controls.any(endpoint, served=self.served))

    async def _hold(self, since: float, size: int) -> None:
        """Wait at most `PATIENCE_SECONDS` for a newer proof."""
        if self.held == MOST_HELD or self._held_bytes + size > MOST_HELD_BYTES:
            return
        self.held += 1
        self._held_bytes += size
        self._window.check_again()
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

    def _note_open(self, sent_at: float) -> None:
        if sent_at > self._open_at:
            self._open_at = sent_at
        self._wake()

    def _wake(self) -> None:
        proof, self._proof = self._proof, asyncio.Event()
        proof.set()

    async def _prove(self, controls: Sequence[Control]) -> None:
        attempts = 0
        while True:
            sent_at = asyncio.get_running_loop().time()
            control, outcome = await self._first_that_may(controls)
            if lets_in(outcome):
                return self._note_open(sent_at)
            assert isinstance(outcome, Failure)
            if not outcome.retryable:
                raise self._refused(control, outcome)
            attempts += 1
            delay = retry_delay(
                outcome, attempts=attempts, policy=self._retry, jitter=random.random()
            )
            if delay is None:
                raise EngineSick(
                    f"{self._where} does not answer control requests: {outcome.message}; the"
                    " requests that it refused stay pending"
                )
            await self._transient_errors.delay(delay)

    async def _first_that_may(self, controls: Sequence[Control]) -> tuple[Control, Outcome]:
        """Ask one control after the other, as long as only the control's endpoint is refused.

        Returns:
            The control that was let in, or else the first one, with its outcome.
        """
        asked: list[tuple[Control, Outcome]] = []
        for control in controls:
            self._asked += 1
            crash_point(CrashPoint.BEFORE_CONTROL)
            outcome = await self._send(
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

    def _refused(self, control: Control, refusal: Failure) -> EngineRefusesUs:
        line = first_line(refusal.message)
        return EngineRefusesUs(
            f"{self._where} refuses access: a control request at {control.endpoint} was"
            f" answered HTTP {refusal.status}: {line}; no request counts as failed for it",
            page=control.endpoint,
            model=control.model,
            status=refusal.status,
            line=line,
        )
