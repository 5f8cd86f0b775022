"""The last health report, as a file."""

import msgspec

from batch_orchestration.files.atomic import write_atomically
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.files.state_file import StateFile
from batch_orchestration.operations.health.report import HealthReport


def write_health(folder: DataFolder, report: HealthReport) -> None:
    """Write the report."""
    write_atomically(folder.health, msgspec.json.encode(report))


def read_health(folder: DataFolder) -> HealthReport | None:
    """Return the last report; None if there is none.

    Raises:
        StorageError: The report is damaged.
    """
    return StateFile(folder.health, HealthReport).read()
