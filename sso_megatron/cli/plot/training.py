"""Draws the picture of losses, and the picture of ``sso-megatron first-run``."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sso_megatron.cli.plot import axes as plot_axes
from sso_megatron.cli.plot.axes import Picture
from sso_megatron.cli.plot.matrices import draw_all_norms
from sso_megatron.runs.file_format import RUN_PICTURE
from sso_megatron.runs.reader import Run, load

_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_SCALES = (
    (1e12, "tokens, 10¹²"),
    (1e9, "tokens, 10⁹"),
    (1e6, "tokens, 10⁶"),
    (1e3, "tokens, 10³"),
    (1.0, "tokens"),
)


def loss(runs: list[Run]) -> Figure | None:
    """Draw the loss against iterations, wall time and, where it is known for every run, tokens."""
    runs = [run for run in runs if np.isfinite(run.loss).any()]
    if not runs:
        return None
    have_tokens = all(run.about.get("tokens_per_iteration") for run in runs)
    figure, axes = plot_axes.panels(3 if have_tokens else 2, across=3, width=4.0, height=3.4)
    for number, run in enumerate(runs):
        _draw(axes[0], run, number, run.iterations.astype(float))
    plot_axes.label_iterations(axes[0])
    seconds = [run.seconds for run in runs]
    unit, name = _unit(_UNITS, seconds)
    for number, run in enumerate(runs):
        _draw(axes[1], run, number, run.seconds / unit)
    axes[1].set_xlabel(f"wall time, {name}")
    if have_tokens:
        tokens = [run.iterations * float(run.about["tokens_per_iteration"]) for run in runs]
        unit, name = _unit(_SCALES, tokens)
        for number, run in enumerate(runs):
            _draw(axes[2], run, number, tokens[number] / unit)
        axes[2].set_xlabel(name)
    for axis in axes:
        axis.set_ylabel("loss, nats a token")
    plot_axes.legend(figure, _extra(runs))
    return figure


def _unit(units: tuple[tuple[float, str], ...], values: list[np.ndarray]) -> tuple[float, str]:
    """Return the largest unit, with its name, of which the largest value has at least two."""
    largest = max(float(np.nanmax(of_run, initial=0)) for of_run in values)
    return next(((size, name) for size, name in units if largest >= 2 * size), units[-1])


def _draw(axis: Axes, run: Run, number: int, x: np.ndarray) -> None:
    known = np.isfinite(run.loss) & np.isfinite(x)
    x, y = x[known], run.loss[known]
    plot_axes.band(axis, x, np.stack([y, y, y]), number, run.name)
    colour = plot_axes.style(number)["color"]
    validation, at = run.summary.get("val_loss"), run.summary.get("iterations", 0)
    if validation is not None and at in run.iterations[known]:
        place = np.searchsorted(run.iterations[known], at)
        axis.plot(x[place], validation, "*", mfc="w", mec=colour, ms=11, mew=1.3, zorder=5)
    if run.alarms:
        wanted = np.isin(run.iterations[known], [iteration for iteration, _ in run.alarms])
        # Alarms are drawn at the foot of the axis, in a row for each run.
        heights = np.full(wanted.sum(), 0.02 + 0.035 * number)
        axis.plot(x[wanted], heights, "|", color=colour, ms=8, transform=axis.get_xaxis_transform())


def _extra(runs: list[Run]) -> list[Line2D]:
    """Return entries of the legend beside the runs' names."""
    found = []
    if any(run.summary.get("val_loss") is not None for run in runs):
        style = {"marker": "*", "mfc": "w", "mec": "k", "ms": 11, "ls": "none"}
        found.append(Line2D([], [], label="validation", **style))  # type: ignore[arg-type]
    if any(run.alarms for run in runs):
        found.append(Line2D([], [], label="alarm", marker="|", ls="none", color="k", ms=8))
    return found


PICTURE = Picture(
    "loss",
    "Loss",
    "The loss falls without jumps, fast at first and ever slower, and the validation loss (star) lies on "
    "the curve.",
    "train with --spectral-run-dir",
    loss,
)


def draw_run(folder: Path) -> Path:
    """Write ``run.png`` into a run's folder: the loss, and spectral norms against the radius.

    Args:
        folder: folder that ``--spectral-run-dir`` named.

    Returns:
        The path of the picture.
    """
    (run,) = load([folder])
    with plot_axes.look():
        figure, axes = plot_axes.panels(2 if run.has_spheres else 1, across=2, width=5.0, height=3.6)
        _draw(axes[0], run, 0, run.iterations.astype(float))
        axes[0].set(ylabel="loss, nats a token", title="Training loss")
        plot_axes.label_iterations(axes[0])
        if run.has_spheres:
            draw_all_norms(axes[1], run)
        plot_axes.legend(figure, _extra([run]))
        path = folder / RUN_PICTURE
        figure.savefig(path)
    return path
