"""The engine in force, and a cache of the facts that it reported at its last start.

Admission checks the next file against those facts before the engine is started.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch_orchestration.core.batches import settings_hash
from batch_orchestration.core.errors import EngineStartFailed, StorageError
from batch_orchestration.engines.base import Engine
from batch_orchestration.engines.simulated.answers import DEFAULT_MODEL
from batch_orchestration.engines.vllm.flags import (
    CPU_ARGS,
    flags_of,
    model_folder,
    names_are_checked,
    top_level,
)
from batch_orchestration.estimates.derivation import DEFAULT_IN_FLIGHT, MOST_IN_FLIGHT
from batch_orchestration.estimates.tables import CachedEngineInfo, EstimateTables
from batch_orchestration.settings import EngineKind, Settings
from batch_orchestration.store.store import Store

logger = logging.getLogger(__name__)

#: Flags that make vLLM serve model names other than the configured one.
_NAMING_FLAGS = frozenset({"served-model-name", "lora-modules", "enable-lora", "config"})


@dataclass(frozen=True, kw_only=True)
class EngineInForce:
    """The configured engine, as far as estimates and limits depend on it.

    Attributes:
        kind: `vllm`, `remote` or `simulated`.
        model: Folder or hub name; the address of a remote engine.
        device: `cuda` or `cpu` for vLLM; `kind` for every other engine.
        args: Flags of the engine's server, without leading dashes.
        folder: Folder of the model; None if it is not on this machine.
        served: Model names that the engine serves; None if only the engine knows them.
        checks_names: Whether the engine refuses every other model name.
        at_a_time: Most requests that the engine computes together.
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
        """Key under which the engine's measurements are stored."""
        return {"engine": self.kind, "model": self.model, "device": self.device}

    @property
    def args_hash(self) -> str:
        """Hash of the flags: reported facts are valid only for the same flags."""
        return settings_hash({"args": dict(self.args)})


def cache_engine_info(engine: Engine, in_force: EngineInForce, store: Store, *, at: float) -> None:
    """Store the facts that a started engine reported. Does nothing if it was not started.

    Context length and KV cache size are left out if a reduced memory level shortened the context. A
    store error is only logged, because the next run reports the same facts.
    """
    figures = engine.figures()
    if "models" not in figures:
        return
    shortened = "max-model-len" in engine.fallback.flags
    facts = CachedEngineInfo(
        models=tuple(figures["models"]),
        max_model_len=None if shortened else figures.get("max_model_len"),
        kv_cache_tokens=None if shortened else figures.get("kv_cache_tokens"),
        start_seconds=figures.get("start_seconds"),
        seen_at=at,
    )
    try:
        EstimateTables(store).put_facts(facts, **in_force.key, args_hash=in_force.args_hash)
    except StorageError as error:
        logger.warning("cannot store what the engine reported at its start: %s", error)


def engine_in_force(settings: Settings) -> EngineInForce:
    """Return the configured engine, as far as estimates and limits depend on it."""
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
    args = flags_of(settings.engine_args)
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
