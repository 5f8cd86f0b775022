"""A batch's memory demand on an engine: an upper bound of its longest request."""

from collections.abc import Iterable, Mapping
from typing import Any

from batch_orchestration.core.batches import MemoryDemand
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


#: The demand of no request at all.
NO_DEMAND = MemoryDemand(longest_tokens=0, prompts_can_be_cut=True)


def memory_demand(requests: Iterable[Request], *, max_tokens_cap: int | None) -> MemoryDemand:
    """Return the combined demand of the requests."""
    return combined(request_demand(request, max_tokens_cap) for request in requests)


def combined(demands: Iterable[MemoryDemand]) -> MemoryDemand:
    """Return a demand that covers all of these."""
    longest, can_be_cut = NO_DEMAND.longest_tokens, NO_DEMAND.prompts_can_be_cut
    for demand in demands:
        can_be_cut = can_be_cut and demand.prompts_can_be_cut
        tokens = demand.longest_tokens
        longest = None if longest is None or tokens is None else max(longest, tokens)
        if longest is None and not can_be_cut:
            break
    return MemoryDemand(longest_tokens=longest, prompts_can_be_cut=can_be_cut)


def request_demand(request: Request, max_tokens_cap: int | None) -> MemoryDemand:
    """Return the demand of one request."""
    if not _is_text(request.fields):
        return MemoryDemand()
    return MemoryDemand(
        longest_tokens=_longest(request, max_tokens_cap),
        prompts_can_be_cut=request.endpoint != "/v1/embeddings",
    )


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
