"""Controls: requests that are known to be harmless, kept to find out whom a refusal is about."""

import msgspec

from batch_orchestration.core.outcomes import Completion
from batch_orchestration.engines.access import Control, one_token_probes

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
