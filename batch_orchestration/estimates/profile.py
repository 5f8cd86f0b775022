"""What a batch asks for, told while its file is read once: shapes of requests, and a sample."""

import hashlib
import heapq
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from batch_orchestration.core.requests import TOKEN_LIMITS, Request, as_integer

#: Enough that the mean of what is sampled is within a few per cent, few enough to be tokenized.
SAMPLE_PER_SHAPE = 200
#: Answers up to so many tokens are labels and short sentences; they mostly use what they may.
SMALL_CAP = 64
#: Tokens of all answers to a request; the few that may have more are a shape of their own. Else
#: one of them in the sample would stand for hundreds that are not like it.
LARGE_CAP = 2**15
#: Answers to one request, and tokens of each, that are expected at most where nothing is known of
#: the engine: OpenAI gives 128 at most, and few contexts are longer.
MOST_ANSWERS, LONGEST_CONTEXT = 128, 2**17

_KINDS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/embeddings": "embedding",
}
EMBEDDING = "embedding"


class SampledRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that stands for others of its shape.

    Attributes:
        size_bytes: Of the body.
        characters: Of the text that goes into the prompt.
        cap: Most tokens that an answer may have, and can have on the engine; None without a limit.
        answers: How many are asked for (`n`), at most `MOST_ANSWERS`.
        prompt_tokens: As the model's tokenizer counts them; None where there is none.
    """

    index: int
    shape: str
    size_bytes: int
    characters: int
    cap: int | None
    answers: int = 1
    prompt_tokens: int | None = None


class ShapeTotals(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests of the batch have a shape, and the bytes of their bodies."""

    requests: int
    size_bytes: int


class TokenProfile(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a batch to estimate it: exact counts by shape, and a sample of each shape."""

    shapes: dict[str, ShapeTotals]
    sample: tuple[SampledRequest, ...]

    @property
    def requests(self) -> int:
        """Usable requests of the batch."""
        return sum(totals.requests for totals in self.shapes.values())


class Profiler:
    """Adds up a batch request by request, in memory that does not grow with it.

    Which requests are sampled depends on their content alone: the same file gives the same profile.

    Args:
        max_tokens_cap: Upper bound that the deployment puts on every answer.
        longest: Tokens of the engine's context; None where it is not known.
        count_tokens: Counts the prompt of an endpoint's body by the model's tokenizer; None where
            it cannot.
    """

    def __init__(
        self,
        *,
        max_tokens_cap: int | None = None,
        longest: int | None = None,
        count_tokens: Callable[[str, Mapping[str, Any]], int | None] = lambda endpoint, body: None,
    ) -> None:
        self._cap = max_tokens_cap
        self._longest = longest or LONGEST_CONTEXT
        self._count_tokens = count_tokens
        self._totals: dict[str, list[int]] = {}
        #: By shape, those whose hash is smallest: highest of them first.
        self._sampled: dict[str, list[tuple[int, int, SampledRequest]]] = {}

    def add(self, request: Request) -> None:
        """Take note of a usable request, or raise and take none."""
        shape = shape_of_request(request, max_tokens_cap=self._cap)
        sampled = self._sampled.setdefault(shape, [])
        key = -_hash(request)
        if len(sampled) < SAMPLE_PER_SHAPE:
            heapq.heappush(sampled, (key, request.index, self._sample(request, shape)))
        elif key > sampled[0][0]:
            heapq.heapreplace(sampled, (key, request.index, self._sample(request, shape)))
        totals = self._totals.setdefault(shape, [0, 0])
        totals[0] += 1
        totals[1] += len(request.body)

    def profile(self) -> TokenProfile:
        """Return what was found so far."""
        sample = [request for sampled in self._sampled.values() for _, _, request in sampled]
        return TokenProfile(
            shapes={
                shape: ShapeTotals(requests=requests, size_bytes=size_bytes)
                for shape, (requests, size_bytes) in sorted(self._totals.items())
            },
            sample=tuple(sorted(sample, key=lambda request: request.index)),
        )

    def _sample(self, request: Request, shape: str) -> SampledRequest:
        body = request.fields
        cap = _answer_cap(request.endpoint, body, self._cap)
        return SampledRequest(
            index=request.index,
            shape=shape,
            size_bytes=len(request.body),
            characters=sum(map(len, prompt_texts(request.endpoint, body))),
            cap=None if cap is None else min(cap, self._longest),
            answers=min(_answers(body), MOST_ANSWERS),
            prompt_tokens=self._count_tokens(request.endpoint, body),
        )


def shape_of_request(request: Request, *, max_tokens_cap: int | None) -> str:
    """Return the shape of a request: requests of one shape have answers of about one length."""
    kind = _KINDS.get(request.endpoint, "other")
    if kind == EMBEDDING:
        return kind
    fields = request.fields
    cap = _answer_cap(request.endpoint, fields, max_tokens_cap)
    if cap is None:
        length = "uncapped"
    elif cap == 1:
        length = "one token"
    elif cap * _answers(fields) > LARGE_CAP:
        length = "very long"
    else:
        length = "short" if cap <= SMALL_CAP else "long"
    return f"{kind}, {'JSON' if _asks_json(fields) else 'text'}, {length}"


def _answer_cap(endpoint: str, fields: Mapping[str, Any], max_tokens_cap: int | None) -> int | None:
    """Return the most tokens that an answer may have; None without a limit."""
    if _KINDS.get(endpoint) == EMBEDDING:
        return 0
    limits = [
        limit
        for limit in (*(as_integer(fields.get(name)) for name in TOKEN_LIMITS), max_tokens_cap)
        if limit is not None and limit > 0
    ]
    if not limits and endpoint == "/v1/completions":
        return 16  # OpenAI's default there, and vLLM's
    return min(limits) if limits else None


def _answers(fields: Mapping[str, Any]) -> int:
    """Return how many answers are asked for."""
    return max(1, as_integer(fields.get("n")) or 1)


def prompt_texts(endpoint: str, body: Mapping[str, Any]) -> list[str]:
    """Return the texts that go into the prompt, in order; what is no text is left out."""
    if endpoint == "/v1/chat/completions":
        messages = body.get("messages")
        if not isinstance(messages, list):
            return []
        contents = [m.get("content") for m in messages if isinstance(m, dict)]
        return [text for content in contents for text in _texts(content)]
    return _texts(body.get("input" if endpoint == "/v1/embeddings" else "prompt"))


def _texts(content: object) -> list[str]:
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return [part for part in parts if isinstance(part, str)]


def _asks_json(fields: Mapping[str, Any]) -> bool:
    form = fields.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    return bool(
        kind not in (None, "text") or fields.get("structured_outputs") or fields.get("guided_json")
    )


def _hash(request: Request) -> int:
    content = f"{request.index} {request.custom_id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
