"""What an engine will certainly refuse, found before it is asked.

Only what is certain: every bound errs on the side of asking. vLLM (0.32, `renderers/params.py` and
`v1/engine/input_processor.py`) refuses a prompt that leaves no room for a token of answer, and a
`max_tokens` above the context; where both fit by themselves but not together, it shortens the
answer. So prompt plus `max_tokens` is no reason to refuse.
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

#: Of a model's name, in a message.
_QUOTED_CHARACTERS = 80
Infeasible = tuple[FailureCode, str]


class Runner(StrEnum):
    """What an engine does with a model; vLLM's own words."""

    GENERATE = "generate"
    POOLING = "pooling"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What is certainly known of an engine; None where it is not.

    Attributes:
        served: Names that it answers to.
        max_model_len: Longest request, prompt and answer together.
        kv_cache_tokens: What its KV cache holds.
        runner: What it does with its model.
    """

    served: tuple[str, ...] | None = None
    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    runner: Runner | None = None

    @property
    def longest(self) -> int | None:
        """Tokens that no request may exceed."""
        known = [limit for limit in (self.max_model_len, self.kv_cache_tokens) if limit]
        return min(known) if known else None


def runner_of(config: Mapping[str, Any], args: Mapping[str, Any], *, pools: bool) -> Runner | None:
    """Return what vLLM does with a model; None where that is not certain.

    Args:
        config: The model's `config.json`.
        args: Flags of the engine.
        pools: Whether the model's folder says, as Sentence Transformers do, that it pools.
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


#: `vllm/config/model.py`, `_SUFFIX_TO_DEFAULTS`: of its list only what has no exceptions.
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
    """Return why the engine will certainly refuse a request; None if it may not.

    Args:
        endpoint: Of the request.
        body: Of the request, as the author wrote it.
        limits: Of the engine.
        overrides: What is changed in the body on its way.
        least_prompt_tokens: Returns a lower bound of the prompt, None without one; asked, at some
            cost, only if the prompt may be too long.
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
    # A prompt to be answered must leave room for one token; one to be embedded need not.
    most = longest if endpoint == EMBEDDINGS else longest - 1
    if prompt is None or prompt <= most:
        return None
    return (
        code,
        f"the prompt has at least {prompt:,} tokens; the engine's context has {longest:,},"
        " answer included",
    )


def _least_asked(body: Mapping[str, Any], overrides: Overrides) -> tuple[int, str]:
    """Return the fewest tokens that are asked for, and by which of the limits.

    Which of them the engine reads does not matter then.
    """
    given = {name: body.get(name) for name in TOKEN_LIMITS}
    given["BATCH_MAX_TOKENS_CAP"] = overrides.max_tokens_cap
    asked = [(limit, name) for name, limit in given.items() if limit is not None]
    if not asked or any(type(limit) is not int for limit, _ in asked):
        return 0, ""
    return min(asked)


def least_tokens(counts: Sequence[int]) -> int:
    """Return a lower bound of a prompt from its texts' tokens, counted one by one.

    A template may join two texts' ends into one token, and a newer tokenizer may count a little
    otherwise: two tokens a text and one in a hundred are given away.
    """
    return max(0, int(sum(counts) * 0.99) - 2 * len(counts))
