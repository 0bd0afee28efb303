"""Draws histograms of the singular values of weights over training, from checkpoints."""

import argparse
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from sso_megatron.cli.plot import axes as plot_axes
from sso_megatron.cli.plot.axes import Picture
from sso_megatron.runs.file_format import CHECKPOINT
from sso_megatron.runs.reader import Run

_MAX_BINS = 40
_HEIGHT = 0.9
"""Height of the highest bar; the next histogram begins at 1."""

Values = dict[str, dict[int, Tensor]]
"""Singular values by name of the matrix and by iteration."""


def check(options: argparse.Namespace) -> None:
    """Check ``--weights`` and ``--checkpoints``.

    Raises:
        ValueError: one of these options cannot be used.
    """
    if options.weights is not None:
        try:
            re.compile(options.weights)
        except re.error as error:
            text = f"--weights {options.weights!r} must be a regular expression: {error}"
            raise ValueError(text) from None
    elif options.checkpoints is not None:
        raise ValueError(f"--checkpoints {options.checkpoints}: say whose singular values with --weights")
    if options.checkpoints is not None and len(options.runs) > 1:
        raise ValueError(
            f"--checkpoints {options.checkpoints}: belongs to one run; leave it out for several"
        )


def picture(options: argparse.Namespace, runs: list[Run]) -> Picture:
    """Read the singular values that ``--weights`` asks for, and return their picture.

    Without ``--weights`` the picture has nothing to draw.

    Raises:
        ValueError: checkpoints cannot be read, or the pattern fits no matrix or too many.
    """
    found: list[Values] = []
    if options.weights is not None:
        from sso_megatron.mcore.offline import (
            singular_values,  # Megatron, which the other pictures do without
        )

        pattern = re.compile(options.weights)
        found = [singular_values.read(options.checkpoints or _checkpoints(run), pattern) for run in runs]
    return Picture(
        "singular_values",
        "Singular values over training",
        "The values spread out slowly from their start, and no single one runs away from the others.",
        "name matrices with --weights PATTERN, for a run that saves checkpoints",
        lambda runs: draw(runs, found) if found else None,
    )


def draw(runs: list[Run], found: list[Values]) -> Figure:
    """Draw a panel for each matrix and run, with a histogram for each checkpoint.

    Args:
        runs: runs to draw.
        found: singular values of each run.
    """
    names = list(dict.fromkeys(name for values in found for name in values))
    several = len(runs) > 1
    across = len(runs) if several else min(3, len(names))
    figure, axes = plot_axes.panels(len(names) * len(runs), across=across, width=3.7, height=3.0)
    for i, name in enumerate(names):
        largest = max(float(s.max()) for values in found for s in values.get(name, {}).values())
        for j, (run, values) in enumerate(zip(runs, found, strict=True)):
            axis = axes[i * len(runs) + j]
            by_iteration = {n: s.numpy() for n, s in values.get(name, {}).items()}
            _ridges(axis, by_iteration, largest)
            _draw_radius(axis, run, name)
            axis.set_title(f"{name}\n{plot_axes.shown_name(run.name)}" if several else name, size=8)
            axis.set(xlabel="singular value", ylabel="iteration")
    plot_axes.legend(figure)
    return figure


def _checkpoints(run: Run) -> Path:
    """Return the folder of a run's checkpoints.

    The folder in ``run.json`` may have been removed, or be on another machine.
    """
    saved = run.about.get("save")
    beside = run.folder / CHECKPOINT
    if saved and not Path(saved).is_dir() and not beside.is_dir():
        raise ValueError(
            f"neither {saved}, where {run.folder} has saved, nor {beside} is a folder; name a single run's "
            "checkpoints with --checkpoints DIR"
        )
    return Path(saved) if saved and Path(saved).is_dir() else beside


def _ridges(axis: Axes, by_iteration: dict[int, np.ndarray], largest: float) -> None:
    """Draw histograms above each other, the first lowest, all to one scale."""
    # Four values a bar at least: a head of 16 rows has only 16 of them.
    num_values = max((len(values) for values in by_iteration.values()), default=0)
    edges = np.linspace(0, largest * 1.02, int(np.clip(num_values // 4, 8, _MAX_BINS)) + 1)
    counts = {n: np.histogram(values, edges)[0] for n, values in by_iteration.items()}
    highest = max((count.max() for count in counts.values()), default=1)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, max(len(counts), 1)))
    for place, (colour, count) in enumerate(zip(colours, counts.values(), strict=False)):
        heights = place + _HEIGHT * count / highest
        axis.stairs(heights, edges, baseline=place, fill=True, color=colour, alpha=0.6)
        axis.stairs(heights, edges, baseline=place, color="k", lw=0.8)
    axis.set_yticks(range(len(counts)), [str(n) for n in counts])
    axis.set_xlim(0, edges[-1])


def _draw_radius(axis: Axes, run: Run, name: str) -> None:
    table = run.tables["matrices"]
    if name in table.rows and "radius" in table.columns:
        radius = table.columns["radius"][:, table.rows.index(name)]
        known = radius[np.isfinite(radius)]
        if known.size:
            axis.axvline(known[-1], color="k", ls=":", lw=1, label="radius")
