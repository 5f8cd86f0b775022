"""What services are given, taken from the deployment's settings: the same for CLI and Dagster."""

from batch_orchestration.services.housekeeping import Cleaner, Part
from batch_orchestration.services.leftovers import (
    clean_leftovers,
    clean_logs,
    clean_rejected,
    clean_samples,
)
from batch_orchestration.services.retention import clean_inputs, clean_journals
from batch_orchestration.settings import Settings

SECONDS_PER_DAY = 86_400.0


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
