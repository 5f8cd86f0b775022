"""Plots of a batch: their values, and the same bytes when drawn again."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from batch_orchestration.engines.metrics import EngineMetrics
from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.samples import RunSample
from batch_orchestration.reports.plots import (
    MOST_SAMPLES,
    SINCE,
    Line,
    Panel,
    Plot,
    draw,
    engine_plot,
    gpu_plot,
    throughput_plot,
)
from batch_orchestration.reports.statistics import Interval, OutcomeHistogram, interval_width
from batch_orchestration_tests.support.builders import NOW


def histogram(*outcomes: tuple[int, int]) -> OutcomeHistogram:
    """Of (answered, failed) in intervals of 10 s; an interval without an outcome is left out."""
    intervals = tuple(
        Interval(number=number, answered=answered, failed=failed, output_tokens=30 * answered)
        for number, (answered, failed) in enumerate(outcomes)
        if answered or failed
    )
    return OutcomeHistogram(since=NOW, width_seconds=10.0, intervals=intervals)


def sample(second: float, *, run_id: str = "run-1", gpus: int = 0, **fields: object) -> RunSample:
    facts = tuple(
        GpuFacts(index=index, uuid=f"GPU-{index}", name="A", utilization_percent=90 + index)
        for index in range(gpus)
    )
    values = {"in_flight": 8, "window": 16, "gpus": facts, **fields}
    return RunSample(at=NOW + second, run_id=run_id, **values)


def line(plot: Plot | None, label: str) -> Line:
    assert plot is not None
    return next(line for panel in plot.panels for line in panel.lines if line.label == label)


def svg(plot: Plot | None) -> bytes:
    picture = draw(plot)
    assert picture is not None
    return picture.svg


def labels(image: bytes) -> set[str]:
    texts = ElementTree.fromstring(image).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(text.itertext()) for text in texts}


def test_throughput_is_per_second_with_pauses_and_its_end_at_zero() -> None:
    plot = throughput_plot(histogram((20, 0), (0, 0), (40, 0), (10, 0)))

    assert line(plot, "answered").values == [2.0, 0.0, 4.0, 1.0, 0.0]
    assert line(plot, "tokens").values == [60.0, 0.0, 120.0, 30.0, 0.0]
    assert plot is not None
    assert plot.seconds == [0, 10, 20, 30, 40]


def test_failures_are_marked_where_they_were() -> None:
    plot = throughput_plot(histogram((20, 0), (20, 5), (20, 0)))

    failed = line(plot, "failed")
    assert failed.marks
    assert failed.values == [None, 0.5, None, None]


def test_a_batch_of_a_few_seconds_has_no_plots() -> None:
    assert throughput_plot(histogram((20, 1), (3, 0))) is None
    assert throughput_plot(None) is None
    assert engine_plot([sample(0), sample(5)], since=NOW) is None
    assert gpu_plot([], since=NOW) is None


def test_the_line_is_interrupted_between_two_runs() -> None:
    samples = [sample(0), sample(5), sample(60, run_id="run-2"), sample(65, run_id="run-2")]

    plot = engine_plot(samples, since=NOW)

    assert line(plot, "in flight").values == [8, 8, None, 8, 8]
    assert plot is not None
    assert plot.seconds == [0, 5, 5, 60, 65]


def test_a_long_run_has_no_more_points_than_can_be_distinguished() -> None:
    samples = [sample(5 * n, in_flight=n % 2) for n in range(17_280)]

    values = line(engine_plot(samples, since=NOW), "in flight").values

    assert len(values) == MOST_SAMPLES
    assert values[0] == pytest.approx(0.5)


def test_unknown_values_are_not_drawn() -> None:
    samples = [sample(second, gpus=2) for second in (0, 5, 10)]

    gpu, engine = gpu_plot(samples, since=NOW), engine_plot(samples, since=NOW)

    assert line(gpu, "GPU 1").values == [91, 91, 91]
    units = [[panel.unit for panel in plot.panels] for plot in (gpu, engine) if plot is not None]
    assert units == [["utilization, %"], ["requests"]]


def test_instances_of_one_device_have_a_line_each() -> None:
    parts = tuple(
        GpuFacts(index=0, uuid=f"MIG-{n}1c0ffee-5e1f", name="A", memory_used_bytes=n * 2**30)
        for n in (1, 2)
    )
    samples = [RunSample(at=NOW + second, run_id="run-1", gpus=parts) for second in (0, 5, 10)]

    plot = gpu_plot(samples, since=NOW)

    assert line(plot, "GPU 0, 11c0ffee").values == [1, 1, 1]
    assert line(plot, "GPU 0, 21c0ffee").values == [2, 2, 2]


def test_a_legend_of_long_names_has_rows_of_its_own_above_the_plot() -> None:
    def height(label: str) -> float:
        lines = [Line(f"{label} {n}", [1.0, 2.0]) for n in range(6)]
        plot = Plot("gpu", "GPU", [0, 1], [Panel("%", lines)], SINCE)
        return float(ElementTree.fromstring(svg(plot)).attrib["height"].removesuffix("pt"))

    assert height("GPU 0, 11c0ffee") > height("GPU")


def test_the_metrics_of_the_engine_are_drawn() -> None:
    metrics = EngineMetrics(waiting=3, kv_usage=0.25)

    plot = engine_plot([sample(second, engine=metrics) for second in (0, 5, 10)], since=NOW)

    assert line(plot, "waiting in the engine").values == [3, 3, 3]
    assert line(plot, "KV cache").values == [25, 25, 25]


def drawn(outcomes: Sequence[tuple[int, int]]) -> bytes:
    return svg(throughput_plot(histogram(*outcomes)))


def test_a_plot_names_its_units_and_is_small() -> None:
    image = drawn([(20, 0), (20, 5), (20, 0)])

    assert {"Throughput", "requests/s", "output tokens/s", "failed"} <= labels(image)
    assert "seconds since first submission" in labels(image)
    assert b"http-equiv" not in image
    assert not re.search(rb"<(script|image)", image)
    assert len(drawn([(400 + n % 90, n % 7) for n in range(120)])) < 30_000


def test_drawing_again_gives_the_same_bytes_in_another_process_too() -> None:
    program = (
        "import sys; from batch_orchestration_tests.unit.reports.test_plots import drawn;"
        "sys.stdout.buffer.write(drawn([(20, 0), (20, 5), (20, 0)]))"
    )
    root = Path(__file__).parents[3]

    other = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, check=True
    )

    assert other.stdout == drawn([(20, 0), (20, 5), (20, 0)])


@pytest.mark.parametrize(
    ("span", "width"),
    [(1, 1), (119, 1), (121, 2), (3600, 30), (86_400, 900), (30 * 86_400, 21_600), (9e8, 7.5168e6)],
)
def test_an_interval_has_a_readable_width(span: float, width: float) -> None:
    assert interval_width(span, most=120) == width
