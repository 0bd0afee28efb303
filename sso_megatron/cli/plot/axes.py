"""The look, axes and SVG text of all pictures: for grey prints, colour-blind people, many points."""

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, MaxNLocator

from sso_megatron.runs.reader import Run

# Okabe and Ito's colours, the dark ones first; dashes and markers tell them apart in grey.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", (0, (6, 2)), (0, (2, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_MARKERS = "osD^vPX"
_PATH, _DIGITS = re.compile(r' d="[^"]*"'), re.compile(r"(\.\d\d)\d+")
_NO_WIDTH = "\u200b"
_MAX_POINTS = 150
"""Most points of a line. With more, an SVG of many panels has several megabytes and looks the same."""

_LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "sso_megatron",  # the same file for the same numbers
}


@dataclass(frozen=True)
class Picture:
    """A picture of one or several runs.

    Attributes:
        name: name of its files, without an ending.
        title: title of its section in the report.
        healthy: one sentence on what a healthy run looks like.
        hint: how to get the records that a run lacks.
        draw: makes the figure; returns None where no run has the records.
    """

    name: str
    title: str
    healthy: str
    hint: str
    draw: Callable[[list[Run]], Figure | None]


@contextlib.contextmanager
def look() -> Iterator[None]:
    """Give figures that are made and saved inside this context the common look."""
    with matplotlib.rc_context(_LOOK):
        yield


def panels(
    count: int, *, across: int = 4, width: float = 3.0, height: float = 2.2
) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` axes of this size in inches, in rows of at most ``across``."""
    columns = min(count, across)
    rows = math.ceil(count / columns)
    # 0.4 inches for the legend above.
    figure = Figure(figsize=(max(columns * width, 5.0), rows * height + 0.4), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, axes


def style(number: int) -> dict[str, object]:
    """Return colour, dashes and marker of the run with this number, the same in every picture."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def line(axis: Axes, x: np.ndarray, y: np.ndarray, number: int, label: str) -> None:
    """Draw a run's line, with markers on some of its points, on different points for each run."""
    every = max(1, len(x) // 8)
    axis.plot(x, y, label=shown_name(label), markevery=(number % every, every), **style(number))  # type: ignore[arg-type]


def band(axis: Axes, x: np.ndarray, spread: np.ndarray, number: int, label: str) -> None:
    """Draw a run's line and fill the area between its two limits.

    Args:
        axis: axes to draw on.
        x: (n,), ascending.
        spread: (3, n): lower limit, line, upper limit.
        number: the run's number, which gives its style.
        label: the run's name, for the legend.
    """
    x, (low, middle, high) = thinned(x, spread)
    line(axis, x, middle, number, label)
    colour, dashes = _COLOURS[number % len(_COLOURS)], _DASHES[number % len(_DASHES)]
    # Edges tell bands that overlap apart, in grey, too.
    edge: dict[str, Any] = {"edgecolor": (colour, 0.6), "linewidth": 0.5, "linestyle": dashes}
    axis.fill_between(x, low, high, facecolor=(colour, 0.12), **edge)


def shown_name(name: str) -> str:
    """Escape a run's name for matplotlib: `$` would begin a formula, a leading `_` hides a label."""
    name = name.replace("$", r"\$")
    return f"{_NO_WIDTH}{name}" if name.startswith("_") else name


def plain_name(text: str) -> str:
    """Return the run's name from a text that ``shown_name`` escaped."""
    return text.removeprefix(_NO_WIDTH).replace(r"\$", "$")


def thinned(x: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace many points by fewer, one for each block of equal size; the first block may be smaller.

    The point of a block has the mean of the line, the widest limits and the x of its last point. Up to
    ``_MAX_POINTS`` points nothing changes.

    Args:
        x: (n,).
        spread: (3, n): lower limit, line, upper limit.
    """
    size = math.ceil(len(x) / _MAX_POINTS)
    if size <= 1:
        return x, spread
    starts = np.arange(len(x) % size, len(x), size)
    starts = np.append(0, starts) if starts[0] else starts
    ends = np.append(starts[1:], len(x)) - 1
    low, middle, high = spread
    known = np.isfinite(middle)
    sums = np.add.reduceat(np.where(known, middle, 0.0), starts)
    counts = np.add.reduceat(known, starts, dtype=int)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    return x[ends], np.stack([np.fmin.reduceat(low, starts), means, np.fmax.reduceat(high, starts)])


def spread_of(values: np.ndarray, middle: Callable[..., np.ndarray] = np.nanmedian) -> np.ndarray:
    """Return smallest, middle and largest finite values of rows of (n, k), as (3, n); NaN if none."""
    found = np.full((3, len(values)), np.nan)
    known = np.isfinite(values).any(axis=1)
    if known.any():
        some = np.where(np.isfinite(values[known]), values[known], np.nan)
        found[:, known] = [np.nanmin(some, axis=1), middle(some, axis=1), np.nanmax(some, axis=1)]
    return found


def label_iterations(axis: Axes) -> None:
    """Label the horizontal axis as iterations, with whole numbers."""
    axis.set_xlabel("iteration")
    whole_numbers(axis, 5)


def whole_numbers(axis: Axes, most: int = 10) -> None:
    """Label the horizontal axis with whole numbers only, at most ``most`` of them."""
    axis.xaxis.set_major_locator(MaxNLocator(most, integer=True))


def log_if_wide(*axes: Axes) -> None:
    """Make axes logarithmic if their lines together span a decade; less would have hardly a tick."""
    lines = [np.ravel(line.get_ydata()) for axis in axes for line in axis.lines]
    values = np.concatenate(lines or [np.zeros(0)])
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size or values.max() < 10 * values.min():
        return
    # Ticks at 3, too, where decades alone would give two or three ticks.
    subs = (1.0, 3.0) if values.max() < 30 * values.min() else (1.0,)
    for axis in axes:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.yaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
        axis.minorticks_off()


def legend(figure: Figure, extra: Sequence[Line2D] = ()) -> None:
    """Put one legend for all panels above them, never over what is drawn."""
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    for handle in extra:
        found[str(handle.get_label())] = handle
    if found:
        columns = min(len(found), max(1, int(figure.get_figwidth() / 2.6)))
        figure.legend(list(found.values()), list(found), loc="outside upper center", ncols=columns)


def svg_of(figure: Figure) -> str:
    """Return a figure as SVG; the same numbers give the same text."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")))
    # Two digits of a point are enough on any screen, and half of the file.
    text = _PATH.sub(lambda path: _DIGITS.sub(r"\1", path[0]), file.getvalue())
    # Verdana is as wide, where a browser has no DejaVu.
    return text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def lay_out(figure: Figure) -> None:
    """Fix the layout of a figure, once for all formats."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
    figure.set_layout_engine("none")
