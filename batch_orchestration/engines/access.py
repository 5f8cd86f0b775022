"""Refusals by the access control in front of a model (the gate), rather than by the model.

A revoked key, an exhausted quota or a proxy without a route refuses every request alike, so the
refusal is not about the request that met it. The status alone does not distinguish the two cases.
`is_doubtful` decides when a control request, known to be harmless, has to find out; `lets_in`
interprets the control's outcome.
"""

import re

import msgspec

from batch_orchestration.core.outcomes import Failure, Outcome

#: Always about the request, whichever component answers.
REQUEST_STATUSES = frozenset({400, 413, 422})
#: About the client's access, never about a request.
_ACCESS_STATUSES = frozenset({401, 402, 407})
#: The server lacks the endpoint, or its model does; a control at another endpoint may succeed.
_OTHER_ENDPOINT = frozenset({404, 405, 501})
LINE_LENGTH = 200
#: The first request to an engine that is being started.
MODELS_PAGE = "/v1/models"
#: Parts that differ between refusals of the same kind: ids, times, counts.
_NUMBERED = re.compile(r"\S*\d\S*")

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_ONE_TOKEN: dict[str, dict[str, object]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 1},
    EMBEDDINGS: {"input": "Hi"},
}


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """A request that only the gate has a reason to refuse.

    Attributes:
        model: The model named in the body; None if the body names none.
    """

    endpoint: str
    body: bytes
    model: str | None = None


def is_doubtful(failure: Failure) -> bool:
    """Return whether the gate may have refused, rather than the model.

    False if the status is always about the request, or if the failure is retried anyway:
    `inference.faults.retries` handles an engine that fails nearly everything. Any other refusal
    stays doubtful until a later request is let in.
    """
    return not failure.retryable and failure.status not in {None, *REQUEST_STATUSES}


def kind_of(refusal: Failure) -> tuple[int, str] | None:
    """Return the part that refusals with the same reason share.

    None for refusals of the client's access. Each of those is examined on its own, even if many
    similar ones turned out to be about their requests.
    """
    status = refusal.status or 0
    if status in _ACCESS_STATUSES or 300 <= status < 400:
        return None
    return status, _NUMBERED.sub("#", first_line(refusal.message))


def lets_in(outcome: Outcome) -> bool:
    """Return whether the outcome of a control shows that requests reach the engine."""
    return not isinstance(outcome, Failure) or outcome.status in REQUEST_STATUSES


def is_of_the_endpoint(failure: Failure) -> bool:
    """Return whether a control at another endpoint may succeed."""
    return failure.status in _OTHER_ENDPOINT


def one_token_probe(endpoint: str, model: str | None) -> Control:
    """Return the smallest request that an endpoint answers."""
    named = {} if model is None else {"model": model}
    body = msgspec.json.encode({**named, **_ONE_TOKEN.get(endpoint, _ONE_TOKEN[CHAT])})
    return Control(endpoint=endpoint, body=body, model=model)


def one_token_probes(endpoint: str, model: str | None) -> list[Control]:
    """Return probes of all endpoints, the given endpoint first."""
    others = [other for other in _ONE_TOKEN if other != endpoint]
    return [one_token_probe(each, model) for each in (endpoint, *others)]


def first_line(text: str) -> str:
    """Return the first non-blank line, truncated and with only printable characters."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    line = next(filter(None, lines), "")
    shown = "".join(char if char.isprintable() else "?" for char in line)
    return shown if len(shown) <= LINE_LENGTH else f"{shown[: LINE_LENGTH - 1]}…"


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A refusal by the gate, in force until a check is let in.

    Attributes:
        engine: The engine's address; empty for an engine that each run starts itself.
        page: The refused path: the endpoint of a control, or the page that lists the models.
        model: The model named in that control; None for the page.
        status: Latest HTTP status; None if the latest check got no answer.
        line: First line of the refusal's message.
        since: Time of the first refusal.
        run_id: The run that met it.
        looked_at: Time of the latest check; at first, of the run's refusal.
        looks: Number of consecutive refused checks.
        let_in_at: Time of the check that was let in; None until then.
    """

    engine: str
    page: str
    model: str | None
    status: int | None
    line: str
    since: float
    run_id: str
    looked_at: float
    looks: int = 0
    let_in_at: float | None = None

    @property
    def words(self) -> str:
        """Status and message, for example `HTTP 401: invalid key`."""
        status = "no answer" if self.status is None else f"HTTP {self.status}"
        return f"{status}: {self.line}" if self.line else status

    @property
    def next_look_at(self) -> float:
        """Time of the next check."""
        return self.looked_at + min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.looks, 16))


#: Seconds between checks of a closed gate: doubled after each check, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
#: If the gate closes again this soon after a check was let in, the pauses continue to grow.
RELAPSE_SECONDS = 600.0
