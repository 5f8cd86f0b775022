"""Tracks the requests that wait because the engine asked for it, so that they can be shown."""

import contextlib
import time
from collections.abc import Iterator

from batch_orchestration.core.outcomes import Failure
from batch_orchestration.core.text import duration
from batch_orchestration.inference.chunk_pass import PendingRequest
from batch_orchestration.workers.progress import Wait

#: Characters of the engine's message to show; the journal has all of it.
REASON_LENGTH = 200


class EngineWaits:
    """The waits of one run. Written from the feed's thread, read from any."""

    def __init__(self) -> None:
        self._waits: dict[PendingRequest, tuple[float, Failure]] = {}

    @contextlib.contextmanager
    def noted(self, pending: PendingRequest, failure: Failure, seconds: float) -> Iterator[None]:
        """Record a wait during the body, if the engine asked for it."""
        if failure.retry_after_seconds:
            self._waits[pending] = (time.time() + seconds, failure)
        try:
            yield
        finally:
            self._waits.pop(pending, None)

    def of(self, batch_id: str) -> Wait | None:
        """Return how many requests of a batch wait, and when and why the first wait ends."""
        waits = [
            wait
            for pending, wait in list(self._waits.items())
            if pending.chunk.batch_id == batch_id
        ]
        if not waits:
            return None
        until, failure = min(waits, key=lambda wait: wait[0])
        return Wait(requests=len(waits), until=until, reason=_reason(failure))


def _reason(failure: Failure) -> str:
    asked = duration(failure.retry_after_seconds or 0.0)
    by = "" if failure.status is None else f" (HTTP status {failure.status})"
    return f"the engine asked for a wait of {asked}{by}: {failure.message[:REASON_LENGTH]}"
