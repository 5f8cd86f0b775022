"""What services are given, taken from the deployment's settings: the same for CLI and Dagster."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from batch_orchestration.core.errors import EngineStartFailed
from batch_orchestration.core.requests import ANY_MODEL
from batch_orchestration.domain.derivation import DEFAULT_IN_FLIGHT, MOST_IN_FLIGHT
from batch_orchestration.domain.ordering import OrderPolicy
from batch_orchestration.domain.rates import Rate, RateLimits
from batch_orchestration.domain.room import Limits
from batch_orchestration.engines.simulated.answers import DEFAULT_MODEL
from batch_orchestration.engines.vllm import CPU_ARGS, model_folder, names_are_checked, top_rung
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.health import gpu_problem
from batch_orchestration.services.admission_settings import AdmissionSettings
from batch_orchestration.services.estimates import EngineInForce, EstimateSettings
from batch_orchestration.services.housekeeping import Cleaner, Part
from batch_orchestration.services.inbox import Inbox
from batch_orchestration.services.leftovers import (
    clean_leftovers,
    clean_logs,
    clean_rejected,
    clean_samples,
)
from batch_orchestration.services.refused_engine import refusal_in_words
from batch_orchestration.services.retention import clean_inputs, clean_journals
from batch_orchestration.services.room import QueueRules
from batch_orchestration.settings import EngineKind, Settings

SECONDS_PER_DAY = 86_400.0
#: Flags by which vLLM answers to other names than the one that we give it.
_NAMING_FLAGS = frozenset({"served-model-name", "lora-modules", "enable-lora", "config"})


def open_inbox(settings: Settings, folder: DataFolder) -> Inbox:
    """Return the inbox of a data folder."""
    return Inbox(
        folder, settle_seconds=settings.settle_seconds, priorities=settings.inbox_priorities
    )


def admission_settings(settings: Settings) -> AdmissionSettings:
    """Return what admission depends on."""
    return AdmissionSettings(
        requests_per_chunk=settings.requests_per_chunk,
        max_line_bytes=settings.max_line_bytes,
        max_file_bytes=settings.max_file_bytes,
        max_requests_per_batch=settings.max_requests_per_batch,
        on_oversize=settings.on_oversize,
        line_policy=settings.line_policy,
        model_required=ANY_MODEL not in settings.model_aliases,
        answer_settings=settings.answer_settings(),
        estimating=estimate_settings(settings),
        queue=queue_rules(settings),
    )


def queue_rules(settings: Settings) -> QueueRules:
    """Return what may be in the queue."""
    return QueueRules(
        limits=Limits(
            unfinished_batches=settings.max_unfinished_batches,
            queued_requests=settings.max_queued_requests,
            queued_tokens=settings.max_queued_tokens,
            disk_reserve_bytes=settings.disk_reserve_bytes,
            output_bytes_ratio=settings.output_bytes_ratio,
            open_requests=settings.max_requests_per_batch,
        ),
        rates=RateLimits(
            submissions=Rate(
                per_hour=settings.source_submissions_per_hour,
                burst=settings.source_submissions_burst,
            ),
            requests=Rate(
                per_hour=settings.source_requests_per_hour,
                burst=settings.source_requests_burst,
            ),
        ),
        ordering=OrderPolicy(ageing_seconds=settings.priority_ageing_seconds),
        device_problem=partial(gpu_problem, settings),
        engine_refusal=partial(refusal_in_words, settings),
    )


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
    rung = top_rung(settings.model, device=device, args=args, in_flight=in_flight)
    return EngineInForce(
        kind="vllm",
        model=settings.model,
        device=device,
        args={**(CPU_ARGS if device == "cpu" else {}), **args},
        folder=_folder(settings.model),
        served=_served(settings, args),
        checks_names=names_are_checked(settings.engine_environment()) and "enable-lora" not in args,
        at_a_time=rung.max_num_seqs or DEFAULT_IN_FLIGHT,
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


def house_parts(settings: Settings) -> list[Part]:
    """Return what housekeeping removes from the data folder, in the order in which it does."""
    days: list[tuple[str, float, Cleaner]] = [
        ("journals", settings.journal_retention_days, clean_journals),
        ("samples", settings.sample_retention_days, clean_samples),
        ("inputs", settings.input_retention_days, clean_inputs),
        ("rejected", settings.rejected_retention_days, clean_rejected),
        ("logs", settings.log_retention_days, clean_logs),
        ("leftovers", settings.leftover_retention_days, clean_leftovers),
    ]
    return [Part(name, SECONDS_PER_DAY * kept, clean) for name, kept, clean in days]
