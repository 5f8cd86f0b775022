"""The profile of a batch, made in one pass over its file: shapes of requests, and a sample."""

import hashlib
import heapq
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from batch_orchestration.core.requests import TOKEN_LIMITS, Request, as_integer

#: Enough for a mean within a few per cent, and few enough to tokenize.
SAMPLE_PER_SHAPE = 200
#: Cap of short answers: labels and short sentences, which mostly use up their cap.
SMALL_CAP = 64
#: Tokens of all answers to a request, above which it has a shape of its own. Otherwise one such
#: request in the sample would represent hundreds of smaller ones.
LARGE_CAP = 2**15
#: Limits on the answers to one request (as OpenAI's API has), and on the tokens of each if the
#: engine's context is unknown (few contexts are longer).
MOST_ANSWERS, LONGEST_CONTEXT = 128, 2**17

_KINDS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/embeddings": "embedding",
}
EMBEDDING = "embedding"


class SampledRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request that represents others of its shape.

    Attributes:
        size_bytes: Size of the body.
        characters: Characters of the prompt's text.
        cap: Most tokens that request and engine allow for an answer; None without a limit.
        answers: Number of answers requested (`n`), at most `MOST_ANSWERS`.
        prompt_tokens: Count by the model's tokenizer; None without a tokenizer.
    """

    index: int
    shape: str
    size_bytes: int
    characters: int
    cap: int | None
    answers: int = 1
    prompt_tokens: int | None = None


class ShapeTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Number of a batch's requests with one shape, and the bytes of their bodies."""

    requests: int
    size_bytes: int


class TokenProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The basis of an estimate: exact counts by shape, and a sample of each shape."""

    shapes: dict[str, ShapeTotals]
    sample: tuple[SampledRequest, ...]

    @property
    def requests(self) -> int:
        """Usable requests of the batch."""
        return sum(totals.requests for totals in self.shapes.values())


class Profiler:
    """Profiles a batch request by request, in memory that does not grow with the batch.

    The sample depends only on index and `custom_id` of each request, so the same file always gives
    the same profile.

    Args:
        max_tokens_cap: The deployment's upper bound for every answer.
        longest: Tokens of the engine's context; None if unknown.
        count_tokens: Returns the prompt tokens of a body, by endpoint and body, or None.
    """

    def __init__(
        self,
        *,
        max_tokens_cap: int | None = None,
        longest: int | None = None,
        count_tokens: Callable[[str, Mapping[str, Any]], int | None] | None = None,
    ) -> None:
        self._cap = max_tokens_cap
        self._longest = longest or LONGEST_CONTEXT
        self._count_tokens = count_tokens
        self._totals: dict[str, list[int]] = {}
        #: By shape, a heap of the requests with the smallest hashes, the highest of these on top.
        self._sampled: dict[str, list[tuple[int, int, SampledRequest]]] = {}

    def add(self, request: Request) -> None:
        """Count a usable request. If this raises, the totals stay as they were."""
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
        """Return the profile of the requests added so far."""
        sample = [request for sampled in self._sampled.values() for _, _, request in sampled]
        return TokenProfile(
            shapes={
                shape: ShapeTotals(requests=requests, size_bytes=size_bytes)
                for shape, (requests, size_bytes) in sorted(self._totals.items())
            },
            sample=tuple(sorted(sample, key=lambda request: request.index)),
        )

    def _sample(self, request: Request, shape: str) -> SampledRequest:
        body, count = request.fields, self._count_tokens
        cap = _answer_cap(request.endpoint, body, self._cap)
        return SampledRequest(
            index=request.index,
            shape=shape,
            size_bytes=len(request.body),
            characters=sum(map(len, prompt_texts(request.endpoint, body))),
            cap=None if cap is None else min(cap, self._longest),
            answers=min(_answers(body), MOST_ANSWERS),
            prompt_tokens=None if count is None else count(request.endpoint, body),
        )


def shape_of_request(request: Request, *, max_tokens_cap: int | None) -> str:
    """Return the shape of a request. Answers to requests of one shape have similar lengths."""
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
    return f"{kind}, {'JSON' if _wants_json(fields) else 'text'}, {length}"


def _answer_cap(endpoint: str, fields: Mapping[str, Any], max_tokens_cap: int | None) -> int | None:
    """Return the limit on the tokens of an answer; None without a limit."""
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
    """Return the number of answers requested."""
    return max(1, as_integer(fields.get("n")) or 1)


def prompt_texts(endpoint: str, body: Mapping[str, Any]) -> list[str]:
    """Return the texts of the prompt, in order; other content is left out."""
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


def _wants_json(fields: Mapping[str, Any]) -> bool:
    form = fields.get("response_format")
    kind = form.get("type") if isinstance(form, dict) else None
    return bool(
        kind not in (None, "text") or fields.get("structured_outputs") or fields.get("guided_json")
    )


def _hash(request: Request) -> int:
    content = f"{request.index} {request.custom_id}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
