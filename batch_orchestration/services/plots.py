"""Plots over time: what is to be drawn as plain values, and drawing it as SVG.

The same values give the same bytes. Text stays text, which keeps a plot small and sharp; its ground
is white, so that it can be read on a page of any colour.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's colours, told apart with any kind of colour blindness (jfly.uni-koeln.de/color).
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = (
    *("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"),
)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
#: Of an axis of time: from so many seconds on, in this unit.
_UNITS = ((10_800.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
_WIDTH_INCHES, _PANEL_INCHES = 7.2, 1.25
_LEFT_INCHES, _RIGHT_INCHES, _TOP_INCHES, _BOTTOM_INCHES = 0.75, 0.1, 0.3, 0.45
#: Of a row of the legend: its height, and the letters that fit in beside the title.
_ROW_INCHES, _ROW_LETTERS = 0.16, 48


@dataclass(frozen=True)
class Line:
    """Values over time; None interrupts the line.

    Attributes:
        marks: Whether only the values themselves are marked, each with a cross.
    """

    label: str
    values: Sequence[float | None]
    colour: str = BLUE
    marks: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines that share a unit.

    Attributes:
        top: End of the scale, which begins at 0; None lets the values decide.
    """

    unit: str
    lines: Sequence[Line]
    top: float | None = None


@dataclass(frozen=True)
class Plot:
    """Panels, one below the other, over the same time.

    Attributes:
        name: One word, for links.
        seconds: Of each value of every line.
        since: What the seconds are counted from, for people.
        stepped: Whether each value holds until the next one.
    """

    name: str
    title: str
    seconds: Sequence[float]
    panels: Sequence[Panel]
    since: str
    stepped: bool = False


def draw(plot: Plot) -> bytes:
    """Return a plot as SVG."""
    # Half a second, which only who delivers a batch shall pay.
    from matplotlib import style
    from matplotlib.figure import Figure

    # Not what the user's own matplotlibrc says, and no random ids.
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
    return _lean(image.getvalue())


#: Coordinates, as attributes and in paths; what is written in the plot is none.
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
    """Say which line is which, above the first panel with these lines."""
    said: list[str] = []
    for axis, panel in zip(axes, panels, strict=True):
        labels = [line.label for line in panel.lines]
        if len(labels) > 1 and labels != said:
            axis.legend(
                loc="lower right", bbox_to_anchor=(1, 1.02), borderpad=0,
                ncols=-(-len(labels) // _rows(panel.lines)), handlelength=1.2,
            )  # fmt: skip
        said = labels


def _rows(lines: Sequence[Line]) -> int:
    """Return in how many rows the legend fits."""
    return -(-sum(len(line.label) for line in lines) // _ROW_LETTERS)


def _lean(svg: bytes) -> bytes:
    """Leave out what nobody sees: digits below a tenth of a point, and indents; half of it all."""
    lean = _COORDINATES.sub(lambda found: _DIGITS.sub(rb"\1", found[0]), svg)
    return _INDENT.sub(b"\n", lean)


def _unit(seconds: Sequence[float]) -> tuple[float, str]:
    """Return length and name of the unit in which the time is shown."""
    longest = max(seconds, default=0.0)
    return next((length, name) for least, length, name in _UNITS if longest >= least)
