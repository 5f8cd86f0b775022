"""Remembers what an engine said of itself: the next file is judged by it before it starts."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch_orchestration.core.batches import BatchOptions, settings_hash
from batch_orchestration.core.errors import EngineStartFailed, StorageError
from batch_orchestration.core.requests import Overrides
from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.simulated.answers import DEFAULT_MODEL
from batch_orchestration.engines.vllm import CPU_ARGS, model_folder, names_are_checked, top_level
from batch_orchestration.estimates.derivation import DEFAULT_IN_FLIGHT, MOST_IN_FLIGHT
from batch_orchestration.estimates.profile import Profiler
from batch_orchestration.estimates.prompt_counting import PromptCounter, prompt_counter
from batch_orchestration.estimates.tables import EngineInfo, EstimateTables
from batch_orchestration.settings import EngineKind, Settings
from batch_orchestration.store.store import Store


@dataclass(frozen=True, kw_only=True)
class EngineInForce:
    """The engine that will answer, as far as estimates and limits depend on it.

    Attributes:
        kind: `vllm`, `remote` or `simulated`.
        model: Folder or hub name; the address of a remote engine.
        device: `cuda` or `cpu`; the kind of any other engine than vLLM.
        args: Flags of its server, without leading dashes.
        folder: Of the model; None if it is not on this machine.
        served: Names that it answers to; None where only the engine knows.
        checks_names: Whether it refuses every other name.
        at_a_time: Requests that it computes together at most.
    """

    kind: str = ""
    model: str = ""
    device: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    served: tuple[str, ...] | None = None
    checks_names: bool = True
    at_a_time: int = 256

    @property
    def key(self) -> dict[str, str]:
        """What measurements of it are kept by."""
        return {"engine": self.kind, "model": self.model, "device": self.device}

    @property
    def args_hash(self) -> str:
        """Of its flags: facts hold for the same ones only."""
        return settings_hash({"args": dict(self.args)})


@dataclass(frozen=True, kw_only=True)
class EstimateSettings:
    """The settings that estimates depend on.

    Attributes:
        price_per_gpu_hour: In whatever currency the owner thinks; None if nobody said.
        strict_windows: Refuse what cannot meet its completion window.
    """

    engine: EngineInForce = field(default_factory=EngineInForce)
    max_tokens_cap: int | None = None
    model_aliases: Mapping[str, str] = field(default_factory=dict)
    price_per_gpu_hour: float | None = None
    strict_windows: bool = False

    @property
    def counter(self) -> PromptCounter | None:
        """What counts prompts for the model; None if nothing here can."""
        return prompt_counter(self.engine.folder)

    def overrides(self, options: BatchOptions) -> Overrides:
        """Return what is changed in the bodies of a batch on their way to the engine."""
        return Overrides(
            model=options.model, aliases=self.model_aliases, max_tokens_cap=self.max_tokens_cap
        )

    def profiler(self, *, longest: int | None = None) -> Profiler:
        """Return what profiles one batch.

        Args:
            longest: Tokens of the engine's context; None where it is not known.
        """
        counter, cap = self.counter, self.max_tokens_cap
        if counter is None:
            return Profiler(max_tokens_cap=cap, longest=longest)
        return Profiler(max_tokens_cap=cap, longest=longest, count_tokens=counter.prompt_tokens)


logger = logging.getLogger(__name__)


def cache_engine_info(engine: Engine, in_force: EngineInForce, store: Store, *, at: float) -> None:
    """Keep what an engine that was started told; of one that was not, nothing is kept.

    Its longest request is left out where the memory ladder had shortened it. A store that cannot be
    written is no reason to fail: the next run tells the same.
    """
    figures = engine.figures()
    if "models" not in figures:
        return
    shortened = "max-model-len" in engine.fallback.flags
    facts = EngineInfo(
        models=tuple(figures["models"]),
        max_model_len=None if shortened else figures.get("max_model_len"),
        kv_cache_tokens=None if shortened else figures.get("kv_cache_tokens"),
        start_seconds=figures.get("start_seconds"),
        seen_at=at,
    )
    try:
        EstimateTables(store).put_facts(facts, **in_force.key, args_hash=in_force.args_hash)
    except StorageError as error:
        logger.warning("what the engine said of itself is not remembered: %s", error)


#: Flags by which vLLM answers to other names than the one that we give it.
_NAMING_FLAGS = frozenset({"served-model-name", "lora-modules", "enable-lora", "config"})


def estimate_settings(settings: Settings) -> EstimateSettings:
    """Return what estimates depend on."""
    return EstimateSettings(
        engine=engine_in_force(settings),
        max_tokens_cap=settings.max_tokens_cap,
        model_aliases=settings.model_aliases,
        price_per_gpu_hour=settings.price_per_gpu_hour,
        strict_windows=settings.strict_windows,
    )


def engine_in_force(settings: Settings) -> EngineInForce:
    """Return the engine that will answer, as far as estimates and limits depend on it."""
    match settings.engine:
        case EngineKind.VLLM:
            return _vllm_in_force(settings)
        case EngineKind.REMOTE:
            return EngineInForce(
                kind="remote",
                model=settings.base_url,
                device="remote",
                at_a_time=settings.in_flight or DEFAULT_IN_FLIGHT,
            )
        case EngineKind.SIMULATED:
            name = settings.served_model_name or DEFAULT_MODEL
            return EngineInForce(
                kind="simulated",
                model=name,
                device="simulated",
                served=(name,),
                at_a_time=settings.in_flight or DEFAULT_IN_FLIGHT,
            )


def _vllm_in_force(settings: Settings) -> EngineInForce:
    args = {name.lstrip("-").replace("_", "-"): v for name, v in settings.engine_args.items()}
    device = str(settings.device)
    in_flight = settings.in_flight or MOST_IN_FLIGHT
    level = top_level(settings.model, device=device, args=args, in_flight=in_flight)
    return EngineInForce(
        kind="vllm",
        model=settings.model,
        device=device,
        args={**(CPU_ARGS if device == "cpu" else {}), **args},
        folder=_folder(settings.model),
        served=_served(settings, args),
        checks_names=names_are_checked(settings.engine_environment()) and "enable-lora" not in args,
        at_a_time=level.max_num_seqs or DEFAULT_IN_FLIGHT,
    )


def _folder(model: str) -> Path | None:
    try:
        return model_folder(model)
    except EngineStartFailed:
        return None


def _served(settings: Settings, args: Mapping[str, Any]) -> tuple[str, ...] | None:
    if not settings.model or _NAMING_FLAGS & args.keys():
        return None
    return (settings.served_model_name or settings.model.rstrip("/").rpartition("/")[2],)
