"""Chunks sized by the cost of their requests, from a sample of the file."""

import io

import pytest

from batch_orchestration.admission.reading.lines import (
    BatchFileReading,
    choose_chunk_size,
    sample_lines,
)
from batch_orchestration.admission.reading.screening import Screening
from batch_orchestration.core.batches import BatchOptions
from batch_orchestration.estimates.batch_estimates import CalibrationData
from batch_orchestration.estimates.costs import Costs, Throughput
from batch_orchestration_tests.support.builders import (
    NOW,
    make_body,
    make_input,
    make_line,
    make_settings,
)

SETTINGS = make_settings(requests_per_chunk=None)


def make_screening(**costs: float) -> Screening:
    none = {"request": 0.0, "prompt_token": 0.0, "completion_token": 0.0, "step": 0.0}
    measured = Throughput(costs=Costs(**{**none, **costs}), spread=0.2, measurements=5, fitted=True)
    data = CalibrationData(throughput=measured if costs else None)
    return Screening(BatchOptions(), settings=SETTINGS, calibration_data=data, now=NOW)


def choose(file: io.BytesIO, screening: Screening) -> int:
    return choose_chunk_size(file, settings=SETTINGS, screening=screening)


@pytest.mark.parametrize(
    ("costs", "size"),
    [({}, 1000), ({"request": 0.1}, 600), ({"request": 10.0}, 50), ({"request": 1e-6}, 5000)],
)
def test_a_chunk_takes_a_minute_by_what_was_measured(costs: dict[str, float], size: int) -> None:
    file = io.BytesIO(make_input(300))

    assert choose(file, make_screening(**costs)) == size
    assert file.tell() == 0


def test_a_file_that_is_sorted_by_length_is_sampled_all_over_and_by_requests() -> None:
    """At its beginning all prompts are short; by its bytes nearly all would be long."""
    body = make_body("word " * 1600)
    long = b"".join(make_line(500 + number, body=body) for number in range(500))
    screening = make_screening(prompt_token=1e-4)

    def size(content: bytes) -> int:
        return choose(io.BytesIO(content), screening)

    # About 2,000 tokens in each long prompt and 30 in each short one.
    assert size(make_input(500)) == 5000
    assert 280 <= size(long) <= 310
    assert 560 <= size(make_input(500) + long) <= 620


@pytest.mark.parametrize("configured", [None, 1, 7, 1000])
@pytest.mark.parametrize("costs", [{}, {"request": 10.0}])
def test_a_batch_is_never_cut_into_thousands_of_chunks(
    configured: int | None, costs: dict[str, float]
) -> None:
    """Whether its chunks are configured, derived or the default: they grow with the file."""
    size = choose_chunk_size(
        io.BytesIO(make_input(2000)),
        settings=make_settings(requests_per_chunk=configured),
        screening=make_screening(**costs),
        most_chunks=10,
    )

    assert size == max(configured or (50 if costs else 1000), 200)


@pytest.mark.parametrize(
    ("content", "lines", "sampled"),
    [
        (b"", 0, 0),
        (b"\n\n\n", 0, 0),
        (b"not json", 1, 1),
        (b"x" * 100_000 + b"\n" + make_input(3), 4, 3),
        (make_input(3).rstrip(b"\n"), 3, 3),
        (make_input(399), 399, 399),
        (make_input(400), 400, 200),
        (make_input(10_000), 10_000, 313),
    ],
)
def test_every_nth_request_is_looked_at(content: bytes, lines: int, sampled: int) -> None:
    found, data = sample_lines(io.BytesIO(content), max_line_bytes=1000)

    assert (found, len(data)) == (lines, sampled)
    assert len(set(data)) == sampled
    assert set(data) <= set(content.splitlines(keepends=True))


def test_the_file_is_cut_as_chosen_and_covered_whole() -> None:
    content = make_input(130)
    reading = BatchFileReading(SETTINGS, screening=make_screening(request=10.0))

    assert sum(1 for _ in reading.read(io.BytesIO(content))) == 130

    assert [chunk.requests for chunk in reading.chunks] == [50, 50, 30]
    assert reading.chunks[-1].end == len(content)


def test_the_sample_leaves_the_screening_of_the_whole_file_alone() -> None:
    """Otherwise the requests of the sample would count twice."""
    screening = make_screening(request=0.1)
    content = make_input(40)
    choose(io.BytesIO(content), screening)

    assert screening.profile().requests == 0
