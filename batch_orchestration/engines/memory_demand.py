"""What a batch needs of an engine's memory: the longest of its requests, estimated from above."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from batch_orchestration.core.requests import Request

#: What a chat template may add to the author's words: control tokens, a default system prompt.
#: The longest one known to us takes about 600 tokens.
TEMPLATE_TOKENS = 1024
#: What the API puts for `max_tokens` of `/v1/completions` where the body says nothing.
COMPLETION_TOKENS = 16
#: Fields that can put more into a prompt than the body shows.
PROMPT_MAKERS = frozenset(
    {"tools", "functions", "documents", "chat_template", "chat_template_kwargs", "prompt_embeds"}
)


class MemoryDemand(msgspec.Struct, frozen=True, kw_only=True):
    """What requests need. By default nothing is known of them.

    Attributes:
        longest_tokens: No request is longer than this, prompt and answer together; None if one
            of them may be of any length.
        prompts_can_be_cut: Every request generates text from text, so that vLLM reads its prompt
            in pieces and `max_num_batched_tokens` may be below its length.
    """

    longest_tokens: int | None = None
    prompts_can_be_cut: bool = False


def memory_demand(requests: Iterable[Request], *, max_tokens_cap: int | None) -> MemoryDemand:
    """Return what the requests need together."""
    longest: int | None = 0
    can_be_cut = True
    for request in requests:
        text = _is_text(request.fields)
        can_be_cut = can_be_cut and text and request.endpoint != "/v1/embeddings"
        tokens = _longest(request, max_tokens_cap) if text else None
        longest = None if longest is None or tokens is None else max(longest, tokens)
        if longest is None and not can_be_cut:
            break
    return MemoryDemand(longest_tokens=longest, prompts_can_be_cut=can_be_cut)


def _longest(request: Request, cap: int | None) -> int | None:
    """Return an upper bound of prompt and answer, in tokens; None if there is none.

    A token stands for a byte or more, and JSON only makes text longer: the body's size bounds the
    author's words. English has three to four bytes a token; the estimate errs on the safe side.
    """
    limit = 0 if request.endpoint == "/v1/embeddings" else _answer_tokens(request, cap)
    return None if limit is None else len(request.body) + TEMPLATE_TOKENS + limit


def _answer_tokens(request: Request, cap: int | None) -> int | None:
    limits = [request.fields.get("max_tokens"), request.fields.get("max_completion_tokens")]
    given = [limit for limit in limits if limit is not None]
    if any(type(limit) is not int for limit in given):
        return None
    if given:
        longest = max(int(limit) for limit in given)
        return longest if cap is None else min(cap, longest)
    if cap is None and request.endpoint == "/v1/completions":
        return COMPLETION_TOKENS
    return cap


def _is_text(fields: Mapping[str, Any]) -> bool:
    """Whether the prompt is made of nothing but the text that the body shows."""
    if any(fields.get(name) for name in PROMPT_MAKERS):
        return False
    messages = fields.get("messages") or ()
    if not isinstance(messages, list | tuple):
        return False
    return all(isinstance(m, dict) and _is_text_content(m.get("content")) for m in messages)


def _is_text_content(content: object) -> bool:
    if content is None or isinstance(content, str):
        return True
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    )
