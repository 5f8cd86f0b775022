"""The engine in force, as far as estimates and the limits on requests depend on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batch_orchestration.core.batches import settings_hash
from batch_orchestration.engines.model_folder import local_model
from batch_orchestration.engines.simulated.answers import DEFAULT_MODEL
from batch_orchestration.engines.vllm.flags import (
    CPU_ARGS,
    flags_of,
    names_are_checked,
    top_level,
)
from batch_orchestration.estimates.derivation import DEFAULT_IN_FLIGHT, MOST_IN_FLIGHT
from batch_orchestration.settings import EngineKind, Settings

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
    model = local_model(settings.model)
    return EngineInForce(
        kind="vllm",
        model=settings.model,
        device=device,
        args={**(CPU_ARGS if device == "cpu" else {}), **args},
        folder=None if model is None else model.path,
        served=_served(settings, args),
        checks_names=names_are_checked(settings.engine_environment()) and "enable-lora" not in args,
        at_a_time=level.max_num_seqs or DEFAULT_IN_FLIGHT,
    )


def _served(settings: Settings, args: Mapping[str, Any]) -> tuple[str, ...] | None:
    if not settings.model or _NAMING_FLAGS & args.keys():
        return None
    return (settings.served_model_name or settings.model.rstrip("/").rpartition("/")[2],)
