"""What services are given, taken from the deployment's settings: the same for CLI and Dagster."""

from batch_orchestration.domain.overrides import ANY_MODEL
from batch_orchestration.services.admission import AdmissionSettings
from batch_orchestration.settings import Settings


def admission_settings(settings: Settings) -> AdmissionSettings:
    """Return what admission depends on."""
    return AdmissionSettings(
        requests_per_chunk=settings.requests_per_chunk,
        max_line_bytes=settings.max_line_bytes,
        line_policy=settings.line_policy,
        model_required=ANY_MODEL not in settings.model_aliases,
        answer_settings=settings.answer_settings(),
    )
