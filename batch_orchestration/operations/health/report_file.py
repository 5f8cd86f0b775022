"""The last report of a deployment's health, as a file that everyone reads."""

import msgspec

from batch_orchestration.files.atomic import read_kept, write_atomically
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.operations.health.report import HealthReport


def write_health(folder: DataFolder, report: HealthReport) -> None:
    """Keep the report that everyone reads."""
    write_atomically(folder.health, msgspec.json.encode(report))


def read_health(folder: DataFolder) -> HealthReport | None:
    """Return the report as it was last written; None if it never was.

    Raises:
        StorageError: It is damaged.
    """
    return read_kept(folder.health, HealthReport)
