"""Finds the requests that an engine will certainly refuse, before they are sent.

Every bound errs on the side of sending. vLLM (0.32, `renderers/params.py` and
`v1/engine/input_processor.py`) refuses a prompt that leaves no room for one answer token, and a
`max_tokens` above the context. If each fits by itself but not both together, vLLM shortens the
answer, so prompt plus `max_tokens` is no reason to refuse.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec

from batch_orchestration.core.outcomes import FailureCode
from batch_orchestration.core.requests import TOKEN_LIMITS, Overrides, resolve_model

EMBEDDINGS = "/v1/embeddings"
CHAT = "/v1/chat/completions"
#: Fields of a body that change how much of the prompt the engine sees.
_CHANGES_PROMPT = (
    *("truncate_prompt_tokens", "truncation_side", "prompt_embeds", "add_special_tokens"),
    *("chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs"),
)

#: Length of a model's name in a message.
_QUOTED_CHARACTERS = 80
Infeasible = tuple[FailureCode, str]


class Runner(StrEnum):
    """The task of a model in an engine, in vLLM's terms."""

    GENERATE = "generate"
    POOLING = "pooling"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of an engine that are known for certain; None where unknown.

    Attributes:
        served: Model names that it answers to.
        max_model_len: Tokens of the longest request, prompt and answer together.
        kv_cache_tokens: Capacity of its KV cache.
    """

    served: tuple[str, ...] | None = None
    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    runner: Runner | None = None

    @property
    def longest(self) -> int | None:
        """Maximum tokens of any request; None if unknown."""
        known = [limit for limit in (self.max_model_len, self.kv_cache_tokens) if limit]
        return min(known) if known else None


def runner_of(config: Mapping[str, Any], args: Mapping[str, Any], *, pools: bool) -> Runner | None:
    """Return the task that vLLM chooses for a model; None if that is not certain.

    Args:
        config: The model's `config.json`.
        args: Flags of the engine.
        pools: Whether the model's folder declares pooling, as Sentence Transformers models do.
    """
    if args.get("runner", "auto") != "auto":
        return Runner(args["runner"]) if args["runner"] in list(Runner) else None
    if {"convert", "task", "hf-overrides", "model-impl"} & args.keys():
        return None
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        return None
    name = str(architectures[0])
    if name in _POOLING:
        return Runner.POOLING
    if name.endswith(_GENERATING) and not pools:
        return Runner.GENERATE
    return None


#: Suffixes without exceptions, from `_SUFFIX_TO_DEFAULTS` in `vllm/config/model.py`.
_GENERATING = ("ForCausalLM", "LMHeadModel")
_POOLING = frozenset(
    {"BertModel", "RobertaModel", "XLMRobertaModel", "DistilBertModel", "NomicBertModel"}
)


def infeasible(
    endpoint: str,
    body: Mapping[str, Any],
    *,
    limits: Limits,
    overrides: Overrides,
    least_prompt_tokens: Callable[[], int | None],
) -> Infeasible | None:
    """Return why the engine will certainly refuse a request; None if it may accept it.

    Args:
        body: As the author wrote it.
        overrides: Changes to the body before it is sent.
        least_prompt_tokens: Returns a lower bound of the prompt, None without one. It is expensive
            and called only if the prompt may be too long.
    """
    return (
        _wrong_endpoint(endpoint, limits)
        or _unknown_model(body, limits, overrides)
        or _too_long(endpoint, body, limits, overrides, least_prompt_tokens)
    )


def _wrong_endpoint(endpoint: str, limits: Limits) -> Infeasible | None:
    if limits.runner is Runner.GENERATE and endpoint == EMBEDDINGS:
        return (
            FailureCode.UNSUPPORTED_ENDPOINT,
            f"the model generates text; it has no embeddings for {EMBEDDINGS}",
        )
    if limits.runner is Runner.POOLING and endpoint != EMBEDDINGS:
        return (
            FailureCode.UNSUPPORTED_ENDPOINT,
            f"the model makes embeddings; it generates no text for {endpoint}",
        )
    return None


def _unknown_model(
    body: Mapping[str, Any], limits: Limits, overrides: Overrides
) -> Infeasible | None:
    if limits.served is None:
        return None
    named = body.get("model")
    asked = resolve_model(
        named if isinstance(named, str) else None, overrides=overrides, served=limits.served
    )
    if asked is None or asked in limits.served:
        return None
    served = ", ".join(limits.served)
    return (
        FailureCode.MODEL_NOT_FOUND,
        f"the engine does not serve {asked[:_QUOTED_CHARACTERS]!r}; it serves {served}"
        " (BATCH_MODEL_ALIASES maps names)",
    )


def _too_long(
    endpoint: str,
    body: Mapping[str, Any],
    limits: Limits,
    overrides: Overrides,
    least_prompt_tokens: Callable[[], int | None],
) -> Infeasible | None:
    longest = limits.longest
    if longest is None:
        return None
    code = FailureCode.CONTEXT_LENGTH_EXCEEDED
    asked, name = _least_asked(body, overrides)
    if endpoint != EMBEDDINGS and asked > longest:
        return code, f"{name} is {asked:,}; the engine's context has {longest:,} tokens"
    if any(body.get(name) is not None for name in _CHANGES_PROMPT):
        return None
    prompt = least_prompt_tokens()
    # A prompt must leave room for one answer token, except for embeddings.
    most = longest if endpoint == EMBEDDINGS else longest - 1
    if prompt is None or prompt <= most:
        return None
    return (
        code,
        f"the prompt has at least {prompt:,} tokens; the engine's context has {longest:,},"
        " answer included",
    )


def _least_asked(body: Mapping[str, Any], overrides: Overrides) -> tuple[int, str]:
    """Return the smallest token limit of a request and its name.

    The smallest is safe, whichever limit the engine reads. It is 0 if there is no limit, or if any
    of them is not an integer.
    """
    given = {name: body.get(name) for name in TOKEN_LIMITS}
    given["BATCH_MAX_TOKENS_CAP"] = overrides.max_tokens_cap
    asked = [(limit, name) for name, limit in given.items() if limit is not None]
    if not asked or any(type(limit) is not int for limit, _ in asked):
        return 0, ""
    return min(asked)


def least_tokens(counts: Sequence[int]) -> int:
    """Return a lower bound of a prompt's tokens from the separate counts of its texts.

    The bound is two tokens per text and one percent below their sum: a template may merge the ends
    of two texts into one token, and a newer tokenizer may count slightly differently.
    """
    return max(0, int(sum(counts) * 0.99) - 2 * len(counts))
