"""The plots of a batch: throughput, engine and GPUs over time."""

import io
import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batch_orchestration.gpu.facts import GpuFacts
from batch_orchestration.gpu.samples import RunSample
from batch_orchestration.reports.statistics import OutcomeHistogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
#: Okabe and Ito's palette, safe for all types of colour blindness (jfly.uni-koeln.de/color).
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = (
    *("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"),
)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
#: Units of the time axis: shortest time span of the unit, its length in seconds, its name.
_UNITS = ((10_800.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
_WIDTH_INCHES, _PANEL_INCHES = 7.2, 1.25
_LEFT_INCHES, _RIGHT_INCHES, _TOP_INCHES, _BOTTOM_INCHES = 0.75, 0.1, 0.3, 0.45
#: Height of a row of the legend, and the letters that fit into it beside the title.
_ROW_INCHES, _ROW_LETTERS = 0.16, 48
#: Limit on points: more cannot be distinguished in a picture as wide as a page.
MOST_INTERVALS = 120
MOST_SAMPLES = 120
#: Fewer points are no curve and add nothing to the numbers in the text.
LEAST_POINTS = 3
#: One line per colour: lines that share a colour could not be compared.
MOST_GPUS = len(COLOURS)
SINCE = "first submission"
_GIBIBYTE = 2**30
#: Prefix of an embedded picture.
URI_PREFIX = "data:image/svg+xml;base64,"
#: Consecutive samples of one run that are drawn as one point; None interrupts the line.
Group = Sequence[RunSample] | None
#: Coordinates in attributes and paths, but not the text of the plot.
_COORDINATES = re.compile(rb' (?:d|x|y|transform)="[^"]*"')
_DIGITS, _INDENT = re.compile(rb"(\.\d)\d+"), re.compile(rb"\n +")
_LOOK = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """Values over time; None interrupts the line.

    Attributes:
        marks: Whether values are drawn as separate crosses instead of a line.
    """

    label: str
    values: Sequence[float | None]
    colour: str = BLUE
    marks: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines that share a unit.

    Attributes:
        top: End of the scale, which begins at 0; None derives it from the values.
    """

    unit: str
    lines: Sequence[Line]
    top: float | None = None


@dataclass(frozen=True)
class Plot:
    """Panels, one below the other, over the same time.

    Attributes:
        name: One word, for links.
        seconds: Times of the values, shared by all lines.
        since: Name of the event at second 0.
        stepped: Whether each value holds until the next one.
    """

    name: str
    title: str
    seconds: Sequence[float]
    panels: Sequence[Panel]
    since: str
    stepped: bool = False


@dataclass(frozen=True)
class Picture:
    """An SVG picture; `name` is one word, unique in the document."""

    name: str
    title: str
    svg: bytes

    @property
    def uri(self) -> str:
        """Data URI of the picture."""
        return f"{URI_PREFIX}{b64encode(self.svg).decode()}"


def draw(plot: Plot | None) -> Picture | None:
    """Return a plot as a picture; None if there is no plot."""
    if plot is None:
        return None
    # Takes half a second, so it is imported at delivery only.
    from matplotlib import style
    from matplotlib.figure import Figure

    # Independent of the user's matplotlibrc, and without random ids.
    fixed = {"svg.hashsalt": plot.name, "svg.fonttype": "none", "path.simplify": True}
    with style.context(["default", {**fixed, **_LOOK}]):
        top = _TOP_INCHES + _ROW_INCHES * (_rows(plot.panels[0].lines) - 1)
        height = _PANEL_INCHES * len(plot.panels) + top + _BOTTOM_INCHES
        figure = Figure(figsize=(_WIDTH_INCHES, height))
        # Matplotlib's own layouts draw everything twice.
        figure.subplots_adjust(
            left=_LEFT_INCHES / _WIDTH_INCHES,
            right=1 - _RIGHT_INCHES / _WIDTH_INCHES,
            bottom=_BOTTOM_INCHES / height,
            top=1 - top / height,
        )
        axes = [*figure.subplots(len(plot.panels), 1, sharex=True, squeeze=False)[:, 0]]
        axes[0].set_title(plot.title, loc="left")
        unit_seconds, unit = _unit(plot.seconds)
        times = [second / unit_seconds for second in plot.seconds]
        for axis, panel in zip(axes, plot.panels, strict=True):
            _draw_panel(axis, panel, times, stepped=plot.stepped)
        _explain(axes, plot.panels)
        axes[-1].set_xlabel(f"{unit} since {plot.since}")
        image = io.BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
    return Picture(plot.name, plot.title, _lean(image.getvalue()))


def _draw_panel(axis: "Axes", panel: Panel, times: Sequence[float], *, stepped: bool) -> None:
    for line in panel.lines:
        values = [float("nan") if value is None else value for value in line.values]
        if line.marks:
            axis.plot(times, values, "x", label=line.label, color=line.colour, markersize=5)
        else:
            drawn = "steps-post" if stepped else "default"
            axis.plot(times, values, label=line.label, color=line.colour, drawstyle=drawn)
    axis.set_ylabel(panel.unit)
    axis.set_ylim(0, panel.top)
    axis.locator_params(axis="y", nbins=4)
    axis.yaxis.set_label_coords(-0.09, 0.5)


def _explain(axes: Sequence["Axes"], panels: Sequence[Panel]) -> None:
    """Add a legend above the first of consecutive panels with the same lines."""
    labelled: list[str] = []
    for axis, panel in zip(axes, panels, strict=True):
        labels = [line.label for line in panel.lines]
        if len(labels) > 1 and labels != labelled:
            axis.legend(
                loc="lower right", bbox_to_anchor=(1, 1.02), borderpad=0,
                ncols=-(-len(labels) // _rows(panel.lines)), handlelength=1.2,
            )  # fmt: skip
        labelled = labels


def _rows(lines: Sequence[Line]) -> int:
    """Return the number of rows that the legend needs."""
    return -(-sum(len(line.label) for line in lines) // _ROW_LETTERS)


def _lean(svg: bytes) -> bytes:
    """Remove digits below a tenth of a point, and indents: half of the size, none of it visible."""
    lean = _COORDINATES.sub(lambda found: _DIGITS.sub(rb"\1", found[0]), svg)
    return _INDENT.sub(b"\n", lean)


def _unit(seconds: Sequence[float]) -> tuple[float, str]:
    """Return length in seconds and name of the unit of the time axis."""
    longest = max(seconds, default=0.0)
    return next((length, name) for least, length, name in _UNITS if longest >= least)


def throughput_plot(outcomes: OutcomeHistogram | None) -> Plot | None:
    """Return the plot of requests and output tokens per second, with failures marked."""
    if outcomes is None or len(outcomes.intervals) < LEAST_POINTS:
        return None
    width = outcomes.width_seconds
    found = {interval.number: interval for interval in outcomes.intervals}
    # A last value of zero, because each value holds to the end of its interval.
    numbers = range(max(found) + 2)
    answered = [found[n].answered / width if n in found else 0.0 for n in numbers]
    failed = [found[n].failed / width if n in found and found[n].failed else None for n in numbers]
    tokens = [found[n].output_tokens / width if n in found else 0.0 for n in numbers]
    requests = [Line("answered", answered)]
    if any(failed):
        requests.append(Line("failed", failed, VERMILLION, marks=True))
    return Plot(
        name="throughput",
        title="Throughput",
        seconds=[n * width for n in numbers],
        panels=[Panel("requests/s", requests), Panel("output tokens/s", [Line("tokens", tokens)])],
        since=SINCE,
        stepped=True,
    )


def engine_plot(samples: Sequence[RunSample], *, since: float) -> Plot | None:
    """Return the plot of window, requests in flight, waiting requests and KV cache usage."""
    groups = [*_grouped(samples)]
    if len(groups) < LEAST_POINTS:
        return None
    in_flight = _means(groups, lambda sample: sample.in_flight)
    if not any(in_flight):
        return None
    requests = [
        Line("window", _means(groups, lambda sample: sample.window), COLOURS[1]),
        Line("in flight", in_flight),
    ]
    waiting = _means(groups, lambda sample: sample.engine.waiting if sample.engine else None)
    if any(value is not None for value in waiting):
        requests.append(Line("waiting in the engine", waiting, COLOURS[2]))
    panels = [Panel("requests", requests)]
    usage = _means(groups, _kv_percent)
    if any(value is not None for value in usage):
        panels.append(Panel("KV cache, %", [Line("KV cache", usage)], top=100))
    return Plot("engine", "Engine", _times(groups, since), panels, SINCE)


def gpu_plot(samples: Sequence[RunSample], *, since: float) -> Plot | None:
    """Return the plot of utilization, memory and temperature of each GPU or MIG instance."""
    groups = [*_grouped(samples)]
    if len(groups) < LEAST_POINTS:
        return None
    labels = _gpu_labels(samples)
    values: tuple[tuple[str, Callable[[GpuFacts], float | None], float | None], ...] = (
        ("utilization, %", lambda gpu: gpu.utilization_percent, 100),
        ("memory, GiB", lambda gpu: _gibibytes(gpu.memory_used_bytes), None),
        ("temperature, °C", lambda gpu: gpu.temperature_celsius, None),
    )
    panels = []
    for unit, value, top in values:
        lines = [
            Line(label, _means(groups, _of_gpu(uuid, value)), colour)
            for (uuid, label), colour in zip(labels.items(), COLOURS, strict=False)
        ]
        lines = [line for line in lines if any(value is not None for value in line.values)]
        panels += [Panel(unit, lines, top)] if lines else []
    return Plot("gpu", "GPU", _times(groups, since), panels, SINCE) if panels else None


def _gpu_labels(samples: Sequence[RunSample]) -> dict[str, str]:
    """Return the label of each device by its uuid; MIG instances of a device share its index."""
    found = sorted({(gpu.index, gpu.uuid) for sample in samples for gpu in sample.gpus})[:MOST_GPUS]
    counts = Counter(index for index, _ in found)
    return {
        uuid: f"GPU {index}" if counts[index] == 1 else f"GPU {index}, {_short(uuid)}"
        for index, uuid in found
    }


def _short(uuid: str) -> str:
    return uuid.removeprefix("MIG-").removeprefix("GPU-")[:8]


def _of_gpu(
    uuid: str, figure: Callable[[GpuFacts], float | None]
) -> Callable[[RunSample], float | None]:
    def of_sample(sample: RunSample) -> float | None:
        return next((figure(gpu) for gpu in sample.gpus if gpu.uuid == uuid), None)

    return of_sample


def _grouped(samples: Sequence[RunSample]) -> Iterator[Group]:
    """Yield groups of samples, so that each plot has few enough points, with a gap between runs.

    The samples of overlapping runs are not mixed: one run follows the other.
    """
    size = max(1, -(-len(samples) // MOST_SAMPLES))
    by_run: dict[str, list[RunSample]] = {}
    for sample in samples:
        by_run.setdefault(sample.run_id, []).append(sample)
    for number, of_run in enumerate(by_run.values()):
        if number:
            yield None
        yield from (of_run[at : at + size] for at in range(0, len(of_run), size))


def _times(groups: Iterable[Group], since: float) -> list[float]:
    """Return the mean time of each group in seconds after `since`.

    A gap gets the time of the group before it.
    """
    times: list[float] = []
    for group in groups:
        if group is not None:
            times.append(sum(sample.at for sample in group) / len(group) - since)
        elif times:
            times.append(times[-1])
    return times


def _means(
    groups: Iterable[Group], figure: Callable[[RunSample], float | None]
) -> list[float | None]:
    means: list[float | None] = []
    for group in groups:
        values = [value for sample in group or () if (value := figure(sample)) is not None]
        means.append(sum(values) / len(values) if values else None)
    return means


def _kv_percent(sample: RunSample) -> float | None:
    usage = sample.engine.kv_usage if sample.engine else None
    return None if usage is None else 100 * usage


def _gibibytes(size_bytes: int | None) -> float | None:
    return None if size_bytes is None else size_bytes / _GIBIBYTE
