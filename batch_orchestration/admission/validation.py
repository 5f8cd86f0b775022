"""Validation: the result that admission would reach for a file, without admitting it."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from batch_orchestration.admission.inbox import reason_to_ignore
from batch_orchestration.admission.reading.batch_files import Fingerprint, open_batch_file
from batch_orchestration.admission.reading.lines import BatchFileReading
from batch_orchestration.admission.reading.screening import Screening
from batch_orchestration.admission.refusal import refusal
from batch_orchestration.admission.sidecars import own_sidecar, read_options
from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.core.errors import FileRefused, StorageError
from batch_orchestration.core.requests import Fault
from batch_orchestration.estimates.batch_estimates import CalibrationData, read_calibration_data
from batch_orchestration.estimates.engine import engine_in_force
from batch_orchestration.estimates.estimate import Estimate
from batch_orchestration.estimates.tables import EstimateTables
from batch_orchestration.settings import Settings

#: Faults that a report lists; the others are only counted.
MAX_LISTED_FAULTS = 1000


class ValidationReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result that admission would reach for a file.

    Attributes:
        refusal: Why the whole file would be rejected; None if it would become a batch.
        size_bytes: Uncompressed.
        lines: Blank ones included.
        requests: Non-blank lines, faulty ones included.
        faults: The first faults, in file order.
        faults_not_listed: Number of further faults.
        estimate: None if the file would be rejected, unless for missing a strict window.
    """

    file_name: str
    refusal: str | None
    size_bytes: int
    lines: int
    requests: int
    faulty: int
    chunks: int
    faults_by_code: dict[str, int]
    faults: tuple[Fault, ...]
    faults_not_listed: int
    estimate: Estimate | None = None


def validate(
    path: Path,
    *,
    settings: Settings,
    options: BatchOptions | None = None,
    max_listed_faults: int = MAX_LISTED_FAULTS,
    tables: EstimateTables | None = None,
    clock: Callable[[], float] = time.time,
) -> ValidationReport:
    """Read a file as admission would; nothing is moved, kept or admitted.

    Args:
        path: `*.jsonl` or `*.jsonl.gz`, anywhere; its side-car is read, too.
        options: Replace the side-car's; None to use those.
        max_listed_faults: Faults beyond this number are only counted.
        tables: Hold the calibration data from earlier batches.

    Raises:
        FileStillChanging: The file changed while it was read.
        FileNotFoundError: The file does not exist.
    """
    faults: list[Fault] = []
    reading, estimate = BatchFileReading(settings), None
    before = Fingerprint.of(path.resolve(strict=True))
    reason = reason_to_ignore(path.name, path.stat().st_mode)
    if reason is None:
        try:
            if options is None:
                options = read_options(own_sidecar(path))
            screening = _screening(options, settings, tables, clock())
            reading = BatchFileReading(settings, options, screening=screening)
            with open_batch_file(path, max_bytes=settings.max_file_bytes) as file:
                for parsed in reading.read(file):
                    if isinstance(parsed, Fault) and len(faults) < max_listed_faults:
                        faults.append(parsed.lean())
            reason = refusal(reading, settings)
            if reason is None:
                estimate = screening.estimate(at=clock(), seed=reading.sha256)
                screening.refuse_if_too_late(estimate)
        except FileRefused as refused:
            reason = str(refused)
    before.verify()
    return ValidationReport(
        file_name=path.name,
        refusal=reason,
        size_bytes=reading.size_bytes,
        lines=reading.lines,
        requests=reading.requests,
        faulty=reading.faulty,
        chunks=len(reading.chunks),
        faults_by_code={str(code): count for code, count in reading.faults_by_code.items()},
        faults=tuple(faults),
        faults_not_listed=reading.faulty - len(faults),
        estimate=estimate,
    )


def _screening(
    options: BatchOptions, settings: Settings, tables: EstimateTables | None, now: float
) -> Screening:
    """Return the screening of requests; without a readable store, it has no calibration data."""
    data = CalibrationData(engine=engine_in_force(settings))
    if tables is not None:
        with contextlib.suppress(StorageError):
            data = read_calibration_data(tables, data.engine)
    return Screening(options, settings=settings, calibration_data=data, now=now)
