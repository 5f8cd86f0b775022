"""Screening: the feasibility and the token profile of a file's usable requests."""

import logging
from collections.abc import Mapping
from typing import Any

from batch_orchestration.admission.reading.feasibility import (
    CHAT,
    EMBEDDINGS,
    Limits,
    Runner,
    infeasible,
    least_tokens,
    runner_of,
)
from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.core.errors import FileRefused
from batch_orchestration.core.requests import Fault, Overrides, Request
from batch_orchestration.engines.model_folder import ModelFolder
from batch_orchestration.engines.simulated.answers import CONTEXT_TOKENS
from batch_orchestration.engines.vllm.flags import whole_number
from batch_orchestration.estimates.batch_estimates import CalibrationData, estimate_profile
from batch_orchestration.estimates.engine import EngineInForce
from batch_orchestration.estimates.estimate import Estimate, window_warning
from batch_orchestration.estimates.profile import Profiler, TokenProfile, prompt_texts
from batch_orchestration.estimates.prompt_counting import PromptCounter, prompt_counter
from batch_orchestration.estimates.tables import CachedEngineInfo
from batch_orchestration.settings import Settings

logger = logging.getLogger(__name__)
#: Validity of a remote engine's info: the engine may be restarted with other settings.
REMOTE_FACTS_SECONDS = 3600.0
#: After this many counted prompts, prompts far below the limit are no longer counted.
COUNTED_ALL = 200
#: A prompt is far below the limit if it fits at this many times the most tokens per byte seen.
RATIO_MARGIN = 1.5
#: Roles whose text every known template keeps whole; some drop the reasoning of answers.
_KEPT_ROLES = ("user", "system", "developer")
#: Flags that change how vLLM renders a prompt or treats its length.
_CHANGES_PROMPT = (
    *("tokenizer", "tokenizer-mode", "chat-template", "chat-template-content-format"),
    *("pooler-config", "override-pooler-config", "default-chat-template-kwargs", "hf-overrides"),
    *("io-processor-plugin", "trust-request-chat-template", "config"),
)


def known_limits(engine: EngineInForce, facts: CachedEngineInfo | None, *, now: float) -> Limits:
    """Return the limits of an engine that are certain.

    The info of an engine with the same flags is used; that of a remote engine only if recent.
    """
    match engine.kind:
        case "vllm":
            return _vllm_limits(engine, facts)
        case "simulated":
            return Limits(served=engine.served, max_model_len=CONTEXT_TOKENS)
        case "remote" if facts is not None and now - facts.seen_at < REMOTE_FACTS_SECONDS:
            return Limits(served=facts.models, max_model_len=facts.max_model_len)
    return Limits()


def _vllm_limits(engine: EngineInForce, facts: CachedEngineInfo | None) -> Limits:
    args = engine.args
    served = engine.served
    if served is None and facts is not None:
        served = facts.models
    longest = None if facts is None else facts.max_model_len
    cache = None if facts is None else facts.kv_cache_tokens
    if "max-model-len" in args:
        # `auto` depends on the free memory, which may be more at the next start.
        longest = whole_number(args["max-model-len"])
        cache = cache if longest is not None else None
    return Limits(
        served=served if engine.checks_names else None,
        max_model_len=longest,
        # vLLM does not start with a cache too small for a request of maximum length.
        kv_cache_tokens=cache
        if longest is not None and cache is not None and cache >= longest
        else None,
        runner=_runner(engine),
    )


def _runner(engine: EngineInForce) -> Runner | None:
    if engine.folder is None:
        return None
    config = ModelFolder(engine.folder).config
    pools = (engine.folder / "modules.json").exists()
    return runner_of(config, engine.args, pools=pools) if config else None


class Feasibility:
    """Checks one request after the other against the limits of the engine.

    Args:
        overrides: Changes to bodies before they are sent.
        engine: Its flags determine whether prompts can be counted here at all.
        counter: Counts like the engine; None if that is not possible here.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        overrides: Overrides,
        engine: EngineInForce,
        counter: PromptCounter | None,
    ) -> None:
        self._limits = limits
        self._overrides = overrides
        exact = not any(name in engine.args for name in _CHANGES_PROMPT)
        self._counter = counter if exact else None
        self._counted = 0
        self._most_per_byte = 0.0

    def fault_of(self, request: Request) -> Fault | None:
        """Return why this engine will refuse a request; None if it may answer the request."""
        if self._limits == Limits():
            return None
        body = request.fields
        found = infeasible(
            request.endpoint,
            body,
            limits=self._limits,
            overrides=self._overrides,
            least_prompt_tokens=lambda: self._least(request),
        )
        return None if found is None else request.refused(*found)

    def _least(self, request: Request) -> int | None:
        """Return a lower bound of the prompt's tokens; None if it fits or cannot be counted."""
        endpoint, body = request.endpoint, request.fields
        if len(request.body) < (self._limits.longest or 0):
            # It fits even at one token per byte.
            return None
        if (ids := _token_ids(endpoint, body)) is not None:
            return ids
        longest = self._limits.longest or 0
        texts = _certain_texts(endpoint, body)
        size = sum(len(text.encode(errors="surrogatepass")) for text in texts)
        # A token covers at least one byte.
        if self._counter is None or size < longest or self._surely_fits(size, longest):
            return None
        counts = [self._counter.text_tokens(text) for text in texts]
        self._counted += 1
        self._most_per_byte = max(self._most_per_byte, sum(counts) / size)
        if endpoint != CHAT:
            # Several texts are several prompts; the longest decides.
            return max((least_tokens([count]) for count in counts), default=None)
        # The engine does not see the text that the template leaves out or cuts off.
        rendered = self._counter.prompt_tokens(endpoint, body)
        least = least_tokens(counts)
        return least if rendered is None else min(least, rendered)

    def _surely_fits(self, size: int, longest: int) -> bool:
        likely = self._counted >= COUNTED_ALL
        return likely and size * self._most_per_byte * RATIO_MARGIN < longest


def _certain_texts(endpoint: str, body: Mapping[str, Any]) -> list[str]:
    """Return the texts that are certainly part of the engine's prompt."""
    if endpoint != CHAT:
        return prompt_texts(endpoint, body)
    messages = body.get("messages")
    kept = [
        message
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, dict) and message.get("role") in _KEPT_ROLES
    ]
    return [text.strip() for text in prompt_texts(endpoint, {"messages": kept})]


def _token_ids(endpoint: str, body: Mapping[str, Any]) -> int | None:
    """Return the length of a prompt given as token ids; None if the prompt is text."""
    if endpoint == CHAT:
        return None
    given = body.get("input" if endpoint == EMBEDDINGS else "prompt")
    if not isinstance(given, list) or not given:
        return None
    if all(type(each) is int for each in given):
        return len(given)
    if all(isinstance(each, list) for each in given):
        return max(map(len, given))
    return None


class Screening:
    """Screens each usable request of one file while it is read."""

    def __init__(
        self,
        options: BatchOptions,
        *,
        settings: Settings,
        calibration_data: CalibrationData,
        now: float,
    ) -> None:
        self._options = options
        self._settings = settings
        self._calibration_data = calibration_data
        self._now = now
        engine = calibration_data.engine
        limits = known_limits(engine, calibration_data.facts, now=now)
        counter = prompt_counter(engine.folder)
        self._profiler = Profiler(
            max_tokens_cap=settings.max_tokens_cap,
            longest=limits.longest,
            count_tokens=None if counter is None else counter.prompt_tokens,
        )
        self._feasibility = Feasibility(
            limits,
            overrides=settings.overrides(options.model),
            engine=engine,
            counter=counter,
        )

    @property
    def knows_costs(self) -> bool:
        """Whether the throughput of the engine was ever measured."""
        return self._calibration_data.throughput is not None

    def fresh_copy(self) -> "Screening":
        """Return a screening with the same settings and calibration data, but no requests yet."""
        return Screening(
            self._options,
            settings=self._settings,
            calibration_data=self._calibration_data,
            now=self._now,
        )

    def examine(self, request: Request) -> Request | Fault:
        """Profile a request and return it; return its fault if the engine will refuse it."""
        if (fault := self._feasibility.fault_of(request)) is not None:
            return fault
        self._profiler.add(request)
        return request

    def profile(self) -> TokenProfile:
        """Return the profile of the requests read so far."""
        return self._profiler.profile()

    def estimate(
        self,
        profile: TokenProfile | None = None,
        *,
        ahead_seconds: float = 0.0,
        at: float,
        seed: str = "",
    ) -> Estimate:
        """Return the estimate for a profile, by default that of the requests read so far."""
        return estimate_profile(
            profile or self.profile(),
            self._options,
            calibration_data=self._calibration_data,
            price_per_gpu_hour=self._settings.price_per_gpu_hour,
            ahead_seconds=ahead_seconds,
            at=at,
            seed=seed,
        )

    def refuse_if_too_late(self, estimate: Estimate) -> None:
        """Refuse a batch that cannot meet its completion window, if windows are strict.

        Raises:
            FileRefused: The estimate exceeds the window; the message has the numbers.
        """
        if self._settings.strict_windows and estimate.cannot_meet_window:
            warning = window_warning(estimate)
            raise FileRefused(f"{warning}, and windows are strict (BATCH_STRICT_WINDOWS)")
