"""Estimates of batches as admission makes and keeps them, and as the queue asks for them."""

from pathlib import Path

import msgspec
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
from batch_orchestration.estimates.costs import Costs, Throughput
from batch_orchestration.estimates.estimate import Band, Basis, Estimate, window_warning
from batch_orchestration.files.data_folder import DataFolder
from batch_orchestration.settings import Settings
from batch_orchestration_tests.support.builders import NOW, make_batch, make_line

SLOW = Throughput(
    costs=Costs(request=60.0, prompt_token=0.0, completion_token=0.0, step=0.0),
    spread=0.1,
    measurements=5,
    fitted=True,
)


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return DataFolder(tmp_path)


def make_intake(
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


def make_estimate(**fields: object) -> Estimate:
    values = {
        "requests": 10,
        "prompt_tokens": Band(low=90, mid=100, high=110),
        "completion_tokens": Band(low=40, mid=50, high=80),
        "basis": Basis.TOKENIZER,
        "seconds": Band(low=60, mid=100, high=200),
    }
    return Estimate(**{**values, **fields})  # type: ignore[arg-type]


def test_what_is_kept_beside_the_plan_is_what_was_made(folder: DataFolder) -> None:
    plan = make_batch(folder, 10)
    screening = make_intake()
    estimate = screening.estimate(at=NOW)

    write_estimate(folder.plan_path(plan.batch_id).parent, screening.profile(), estimate)

    assert read_estimate(folder, plan.batch_id) == estimate
    assert read_profile(folder, plan.batch_id) == screening.profile()


def test_the_queue_asks_for_what_is_pending(folder: DataFolder) -> None:
    plan = make_batch(folder, 10)
    write_estimate(folder.plan_path(plan.batch_id).parent, make_intake().profile(), make_estimate())

    assert expected_seconds(plan, folder=folder, pending=5) == Band(low=30, mid=50, high=100)


def test_a_batch_without_an_estimate_has_no_time(folder: DataFolder) -> None:
    plan = make_batch(folder, 10)

    assert expected_seconds(plan, folder=folder) is None


def test_a_damaged_estimate_is_as_none(folder: DataFolder) -> None:
    plan = make_batch(folder, 10)
    (folder.plan_path(plan.batch_id).parent / "estimate.json").write_bytes(b"{torn")

    assert read_estimate(folder, plan.batch_id) is None


def test_a_price_is_that_of_the_time_on_the_device() -> None:
    estimate = make_intake(price_per_gpu_hour=3.6).estimate(at=NOW)

    assert estimate.seconds is not None
    assert estimate.price is not None
    assert estimate.price.mid == pytest.approx(estimate.seconds.mid / 1000)
    assert make_intake().estimate(at=NOW).price is None


def test_a_batch_that_cannot_meet_its_window_is_warned_of_with_the_numbers() -> None:
    estimate = make_intake(window="10m").estimate(at=NOW, ahead_seconds=60)

    warning = window_warning(estimate)
    assert warning is not None
    assert "cannot end within its completion window of 10 min 0 s" in warning
    assert "1 min 0 s of them behind other batches" in warning


def test_it_is_refused_only_where_windows_are_strict() -> None:
    lax, strict = make_intake(window="10m"), make_intake(window="10m", strict_windows=True)
    estimate = lax.estimate(at=NOW)

    lax.refuse_if_too_late(estimate)
    with pytest.raises(FileRefused, match="cannot end within its completion window"):
        strict.refuse_if_too_late(estimate)


def test_a_window_that_may_be_missed_is_no_reason_to_refuse() -> None:
    screening = make_intake(window="1m", strict_windows=True)
    close = make_estimate(window_seconds=80.0)

    screening.refuse_if_too_late(close)

    assert "may not end" in str(window_warning(close))


def test_no_warning_where_there_is_no_estimate_of_time_or_time_enough() -> None:
    assert window_warning(make_estimate(seconds=None, window_seconds=1.0)) is None
    assert window_warning(make_estimate(window_seconds=86_400.0)) is None


def test_an_estimate_survives_its_file() -> None:
    estimate = make_intake(price_per_gpu_hour=1.0).estimate(at=NOW)

    assert msgspec.json.decode(msgspec.json.encode(estimate), type=Estimate) == estimate
