"""What services are given, taken from the deployment's settings: the same for CLI and Dagster."""

from batch_orchestration.core.requests import ANY_MODEL
from batch_orchestration.estimates.engine import estimate_settings
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.queue.load import queue_rules
from batch_orchestration.services.admission_settings import AdmissionSettings
from batch_orchestration.services.housekeeping import Cleaner, Part
from batch_orchestration.services.inbox import Inbox
from batch_orchestration.services.leftovers import (
    clean_leftovers,
    clean_logs,
    clean_rejected,
    clean_samples,
)
from batch_orchestration.services.retention import clean_inputs, clean_journals
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
