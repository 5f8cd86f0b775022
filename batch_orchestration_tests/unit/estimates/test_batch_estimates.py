"""Estimates of batches as admission writes them and as the queue reads them."""

from pathlib import Path

import pytest

from batch_orchestration.admission.reading.screening import Screening
from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.core.errors import FileRefused
from batch_orchestration.core.requests import Request, parse_line
from batch_orchestration.estimates.batch_estimates import (
    CalibrationData,
    expected_seconds,
    read_estimate,
    read_profile,
    write_estimate,
)
from batch_orchestration.estimates.costs import Throughput
from batch_orchestration.estimates.estimate import window_warning
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.settings import Settings
from batch_orchestration_tests.support.builders import NOW, make_batch, make_line
from batch_orchestration_tests.support.estimates import make_band, make_estimate, make_throughput

SLOW = make_throughput(request=60.0)


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return DataFolder(tmp_path)


def make_screening(
    *,
    throughput: Throughput | None = SLOW,
    window: str = "24h",
    requests: int = 100,
    **fields: object,
) -> Screening:
    screening = Screening(
        BatchOptions(completion_window=window),
        settings=Settings(**fields),  # type: ignore[arg-type]
        calibration_data=CalibrationData(throughput=throughput),
        now=NOW,
    )
    for index in range(requests):
        request = parse_line(make_line(index), index=index, line=index + 1)
        assert isinstance(request, Request)
        screening.examine(request)
    return screening


def test_an_estimate_is_written_beside_the_plan(folder: DataFolder) -> None:
    plan = make_batch(folder, 10)
    screening = make_screening(price_per_gpu_hour=1.0)
    estimate = screening.estimate(at=NOW)

    write_estimate(folder.plan_path(plan.batch_id).parent, screening.profile(), estimate)

    assert read_estimate(folder, plan.batch_id) == estimate
    assert read_profile(folder, plan.batch_id) == screening.profile()


def test_the_expected_time_is_scaled_to_the_pending_requests(folder: DataFolder) -> None:
    plan = make_batch(folder, 10)
    write_estimate(
        folder.plan_path(plan.batch_id).parent, make_screening().profile(), make_estimate()
    )

    assert expected_seconds(plan, folder=folder, pending=5) == make_band(50)


def test_a_batch_with_a_missing_or_damaged_estimate_has_no_expected_time(
    folder: DataFolder,
) -> None:
    plan = make_batch(folder, 10)
    assert expected_seconds(plan, folder=folder) is None

    (folder.plan_path(plan.batch_id).parent / "estimate.json").write_bytes(b"{torn")

    assert expected_seconds(plan, folder=folder) is None


def test_a_price_is_that_of_the_time_on_the_device() -> None:
    estimate = make_screening(price_per_gpu_hour=3.6).estimate(at=NOW)

    assert estimate.seconds is not None
    assert estimate.price is not None
    assert estimate.price.mid == pytest.approx(estimate.seconds.mid / 1000)
    assert make_screening().estimate(at=NOW).price is None


def test_the_warning_of_a_batch_that_cannot_meet_its_window_has_the_numbers() -> None:
    estimate = make_screening(window="10m").estimate(at=NOW, ahead_seconds=60)

    warning = window_warning(estimate)
    assert warning is not None
    assert "cannot end within its completion window of 10 min 0 s" in warning
    assert "including 1 min 0 s behind other batches" in warning


def test_a_batch_that_cannot_meet_its_window_is_refused_only_if_windows_are_strict() -> None:
    lax, strict = make_screening(window="10m"), make_screening(window="10m", strict_windows=True)
    estimate = lax.estimate(at=NOW)

    lax.refuse_if_too_late(estimate)
    with pytest.raises(FileRefused, match="cannot end within its completion window"):
        strict.refuse_if_too_late(estimate)


def test_a_window_that_may_be_missed_is_no_reason_to_refuse() -> None:
    screening = make_screening(window="1m", strict_windows=True)
    close = make_estimate(window_seconds=80.0)

    screening.refuse_if_too_late(close)

    assert "may not end" in str(window_warning(close))


def test_there_is_no_warning_without_an_estimate_of_time_or_with_time_enough() -> None:
    assert window_warning(make_estimate(seconds=None, window_seconds=1.0)) is None
    assert window_warning(make_estimate(window_seconds=86_400.0)) is None
