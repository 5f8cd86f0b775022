"""The gate: whoever stands before the model, and may let nobody through whatever is asked.

A key that was revoked, a quota that is used up, a proxy that has lost its route: these refuse
everything, and say nothing about the request that happened to meet them. A status alone does not
tell whose refusal it is; `is_doubtful` says when it has to be found out by a control request, one
that is known to be harmless, and `lets_in` what the answer to that means.
"""

import re

import msgspec

from batch_orchestration.core.outcomes import Failure, Outcome

#: These are about what was asked, whoever says them.
OWN_STATUSES = frozenset({400, 413, 422})
#: These are about who asks, and about no request.
_KEEPERS_STATUSES = frozenset({401, 402, 407})
#: The server has no such endpoint, or its model has not; another one of it may be answered.
_OTHER_ENDPOINT = frozenset({404, 405, 501})
LINE_LENGTH = 200
#: What an engine that is started is asked first.
MODELS_PAGE = "/v1/models"
#: Whatever differs from one refusal to the next of the same kind: ids, times, counts.
_NUMBERED = re.compile(r"\S*\d\S*")

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_ONE_TOKEN: dict[str, dict[str, object]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 1},
    EMBEDDINGS: {"input": "Hi"},
}


class Control(msgspec.Struct, frozen=True, kw_only=True):
    """A request that nothing speaks against.

    Attributes:
        model: Named in the body; None if none is.
    """

    endpoint: str
    body: bytes
    model: str | None = None


def is_doubtful(failure: Failure) -> bool:
    """Whether the refusal may be the gate's.

    Not if the status is always the request's own, nor if the failure is sent again anyway: an
    engine that fails nearly everything is `inference.faults.retries`'s. Of any other refusal only a
    request that is let in afterwards shows that not everything is refused alike.
    """
    return not failure.retryable and failure.status not in {None, *OWN_STATUSES}


def kind_of(refusal: Failure) -> tuple[int, str] | None:
    """Return what refusals of the same reason have in common.

    None for those that say who may ask at all: of these each is found out by itself, however many
    like it were the requests' own.
    """
    status = refusal.status or 0
    if status in _KEEPERS_STATUSES or 300 <= status < 400:
        return None
    return status, _NUMBERED.sub("#", first_line(refusal.message))


def lets_in(outcome: Outcome) -> bool:
    """Whether the outcome of a control shows that requests get through to the engine."""
    return not isinstance(outcome, Failure) or outcome.status in OWN_STATUSES


def is_of_the_endpoint(failure: Failure) -> bool:
    """Whether a control at another endpoint may fare better."""
    return failure.status in _OTHER_ENDPOINT


def one_token_probe(endpoint: str, model: str | None) -> Control:
    """Return the smallest request that an endpoint answers."""
    named = {} if model is None else {"model": model}
    body = msgspec.json.encode({**named, **_ONE_TOKEN.get(endpoint, _ONE_TOKEN[CHAT])})
    return Control(endpoint=endpoint, body=body, model=model)


def one_token_probes(endpoint: str, model: str | None) -> list[Control]:
    """Return probes of all endpoints, that which is asked for first."""
    others = [other for other in _ONE_TOKEN if other != endpoint]
    return [one_token_probe(each, model) for each in (endpoint, *others)]


def first_line(text: str) -> str:
    """Return the first line that says something, cut and fit to be shown to a person."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    line = next(filter(None, lines), "")
    shown = "".join(char if char.isprintable() else "?" for char in line)
    return shown if len(shown) <= LINE_LENGTH else f"{shown[: LINE_LENGTH - 1]}…"


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """That the engine does not let us in, as long as nobody has seen that it does again.

    Attributes:
        engine: Its address; empty for an engine that each run starts by itself.
        page: What was refused: the endpoint of a control, or the page that lists the models.
        model: Named in that control; None for the page.
        status: HTTP status, latest; None if the latest look met no answer.
        line: First line of what was said with it.
        since: POSIX seconds of the first refusal.
        run_id: Of the run that met it.
        looked_at: POSIX seconds of the latest look, or of the run's.
        looks: How many in a row were refused.
        let_in_at: POSIX seconds at which a look was let in; None while none was.
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
        """What the gate says: `HTTP 401: invalid key`."""
        status = "no answer" if self.status is None else f"HTTP {self.status}"
        return f"{status}: {self.line}" if self.line else status

    @property
    def next_look_at(self) -> float:
        """When it is worth another look, POSIX seconds."""
        return self.looked_at + min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(self.looks, 16))


#: Between looks at a gate that is closed, in seconds: doubled after each, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 60.0
#: A gate that closes again so soon after it was seen open is looked at as if it had not been.
RELAPSE_SECONDS = 600.0
