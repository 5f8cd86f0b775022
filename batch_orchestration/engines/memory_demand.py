"""A batch's memory demand on an engine: an upper bound of its longest request."""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from batch_orchestration.core.requests import Request

#: Tokens that a chat template may add to the messages: control tokens, a default system prompt.
#: The longest known template takes about 600.
TEMPLATE_TOKENS = 1024
#: The API's default for `max_tokens` of `/v1/completions`.
COMPLETION_TOKENS = 16
#: Fields that can add more to a prompt than the body shows.
PROMPT_MAKERS = frozenset(
    {"tools", "functions", "documents", "chat_template", "chat_template_kwargs", "prompt_embeds"}
)


class MemoryDemand(msgspec.Struct, frozen=True, kw_only=True):
    """The demand of some requests. The defaults stand for unknown requests.

    Attributes:
        longest_tokens: Upper bound of prompt and answer together, for every request; None if a
            request may be of any length.
        prompts_can_be_cut: Every request generates text from text. vLLM then processes a prompt in
            pieces, and `max_num_batched_tokens` may be below its length.
    """

    longest_tokens: int | None = None
    prompts_can_be_cut: bool = False


def memory_demand(requests: Iterable[Request], *, max_tokens_cap: int | None) -> MemoryDemand:
    """Return the combined demand of the requests."""
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
    """Return an upper bound of prompt and answer in tokens; None if there is none.

    A token stands for a byte or more, and JSON only lengthens text, so the body's size bounds the
    prompt. English has three to four bytes a token; the estimate errs on the safe side.
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
    """Return whether the prompt consists only of text that the body shows."""
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
