"""What services are given, taken from the deployment's settings: the same for CLI and Dagster."""

from functools import partial

from batch_orchestration.core.requests import ANY_MODEL
from batch_orchestration.domain.ordering import OrderPolicy
from batch_orchestration.domain.rates import Rate, RateLimits
from batch_orchestration.domain.room import Limits
from batch_orchestration.estimates.engine import estimate_settings
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.gpu.health import gpu_problem
from batch_orchestration.services.admission_settings import AdmissionSettings
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
from batch_orchestration.settings import Settings

SECONDS_PER_DAY = 86_400.0


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
