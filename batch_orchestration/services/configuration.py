"""What services are given, taken from the deployment's settings: the same for CLI and Dagster."""

from batch_orchestration.domain.overrides import ANY_MODEL
from batch_orchestration.services.admission import AdmissionSettings
from batch_orchestration.services.inbox import Inbox
from batch_orchestration.settings import Settings
from batch_orchestration.storage.files import DataFolder


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
        line_policy=settings.line_policy,
        model_required=ANY_MODEL not in settings.model_aliases,
        answer_settings=settings.answer_settings(),
    )
