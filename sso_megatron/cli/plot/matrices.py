"""Draws the measurements of every logical matrix, with a panel for each kind of module."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sso_megatron.cli.plot import axes as plot_axes
from sso_megatron.cli.plot.axes import Picture
from sso_megatron.runs.module_names import place_of
from sso_megatron.runs.reader import Run

_MEASURE = "train with --log-spectral-metrics N"
_NORM = "‖W‖₂ / R"


@dataclass(frozen=True)
class Quantity:
    """A column of the table of matrices, and how it is drawn.

    Attributes:
        column: name of the column.
        label: label of the vertical axis.
        value: computes the shown numbers from the column's.
        middle: reduces the values of a kind of module to its line.
        is_log: whether the axis is logarithmic if the numbers span a decade.
        is_shared: whether all panels have the same limits.
    """

    column: str
    label: str
    value: Callable[[np.ndarray], np.ndarray] = np.asarray
    middle: Callable[..., np.ndarray] = np.nanmedian
    is_log: bool = False
    is_shared: bool = True


def kinds(rows: list[str]) -> dict[str, list[int]]:
    """Return the indices of the rows of each kind of module, attention's first."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(rows):
        found.setdefault(place_of(name)[0], []).append(i)
    # Attention first, as in a layer; by name the MLP comes before it.
    return dict(sorted(found.items(), key=lambda item: "attention" not in item[0]))


def draw(runs: list[Run], quantity: Quantity) -> Figure | None:
    """Draw the smallest, middle and largest value of each kind of module over training, runs overlaid."""
    parts = [
        (number, run, run.tables["matrices"])
        for number, run in enumerate(runs)
        if np.isfinite(run.tables["matrices"].columns.get(quantity.column, np.nan)).any()
    ]
    if not parts:
        return None
    rows = {number: kinds(table.rows) for number, _, table in parts}
    titles = list(dict.fromkeys(kind for by_kind in rows.values() for kind in by_kind))
    figure, axes = plot_axes.panels(len(titles))
    for axis, kind in zip(axes, titles, strict=True):
        count = 0
        for number, run, table in parts:
            if members := rows[number].get(kind):
                values = quantity.value(table.columns[quantity.column][:, members])
                spread = plot_axes.spread_of(values, quantity.middle)
                plot_axes.band(axis, table.iterations, spread, number, run.name)
                count = max(count, len(members))
                _draw_limits(axis, run, quantity, members, number)
        axis.set_title(f"{kind} ({count})" if count > 1 else kind, loc="left", size=8)
        plot_axes.label_iterations(axis)
        axis.set_xlabel("")
    if quantity.is_log:
        plot_axes.log_if_wide(*axes)
    if quantity.is_shared:
        limits = [axis.get_ylim() for axis in axes]
        for axis in axes:
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    figure.supxlabel("iteration", size=9)
    figure.supylabel(quantity.label, size=9)
    plot_axes.legend(figure, _notes(runs, quantity))
    return figure


def _draw_limits(axis: Axes, run: Run, quantity: Quantity, members: list[int], number: int) -> None:
    """Draw the limits that the values of a quantity should stay within."""
    colour = plot_axes.style(number)["color"]
    columns, iterations = run.tables["matrices"].columns, run.tables["matrices"].iterations
    if quantity.column == "radius_error":
        axis.axhline(1, color="k", lw=0.6)
        if "relative_step" in columns:
            step = plot_axes.spread_of(columns["relative_step"][:, members])
            x, (_, _, step) = plot_axes.thinned(iterations, step)
            for sign in (-1, 1):
                axis.plot(x, 1 + sign * step, ":", color=colour, lw=0.9)
    elif quantity.column == "residual" and (tolerance := _tolerance(run)):
        axis.axhline(tolerance, ls=":", color=colour, lw=0.9)


def _tolerance(run: Run) -> float | None:
    """Return the residual at which bisection stops; None for tracking, which stops after its trials."""
    is_searched = run.settings.get("solver") == "bisection"
    return run.settings.get("solver_tolerance") if is_searched else None


def _notes(runs: list[Run], quantity: Quantity) -> list[Line2D]:
    if quantity.column == "radius_error":
        text = "as far as one step can move a norm"
    elif quantity.column == "residual" and any(map(_tolerance, runs)):
        text = "tolerance"
    else:
        return []
    return [Line2D([], [], ls=":", color="k", lw=0.9, label=text)]


def draw_all_norms(axis: Axes, run: Run) -> None:
    """Draw the spectral norms of all matrices by their radii over training, on one axis."""
    table = run.tables["matrices"]
    low, middle, high = plot_axes.spread_of(table.columns["radius_error"] + 1)
    for values, dashes, label in ((high, "--", "largest"), (middle, "-", "median"), (low, ":", "smallest")):
        axis.plot(table.iterations, values, dashes, color="k", lw=1.4, label=label)
    axis.axhline(1, color="k", lw=0.6)
    axis.set(ylabel=_NORM, title="Spectral norms by the radius, before retraction")
    plot_axes.label_iterations(axis)


def _picture(name: str, title: str, quantity: Quantity, healthy: str, hint: str = _MEASURE) -> Picture:
    return Picture(name, title, healthy, hint, lambda runs: draw(runs, quantity))


def _of(names: str) -> str:
    return f"{_MEASURE} and {names}"


_ON_SPHERES = _of("--optimizer sso or muon_sphere")

PICTURES = [
    _picture(
        "norm_by_radius",
        "Spectral norms against the radius, before retraction",
        Quantity("radius_error", _NORM, lambda error: error + 1),
        "Every norm stays within the dotted lines, as far as one step can move it, and comes to 1 as the "
        "learning rate falls.",
        _ON_SPHERES,
    ),
    _picture(
        "spectral_norm",
        "Spectral norms",
        Quantity("spectral_norm", "‖W‖₂", is_shared=False),
        "On spheres the norms stay where they are; under other optimizers they grow fast at first and then "
        "level off, and none keeps growing faster than the others of its kind.",
    ),
    _picture(
        "stable_rank",
        "Stable ranks of the weights",
        Quantity("stable_rank", "‖W‖²F / ‖W‖₂²", is_shared=False),
        "The stable rank changes slowly and stays well above 1, where a single direction would be left.",
    ),
    _picture(
        "update_ratio",
        "Update by weight",
        Quantity("update_ratio", "‖ΔW‖F / ‖W‖F", is_log=True),
        "The ratio follows the learning rate's schedule, about alike for all kinds, and has no spikes.",
    ),
    _picture(
        "update_rms",
        "Root mean square of the update",
        Quantity("update_rms", "RMS of ΔW", is_log=True),
        "The size of the update's entries follows the learning rate's schedule.",
    ),
    _picture(
        "lambda",
        "Lagrange multiplier",
        Quantity("lam", "λ"),
        "λ moves slowly about 0; a jump is a matrix whose momentum suddenly points off its sphere.",
        _of("--optimizer sso"),
    ),
    _picture(
        "residual",
        "Residual of the solver",
        Quantity("residual", "|h(λ)|", np.abs, is_log=True),
        "The residual stays about as small as it began, and does not grow with training.",
        _of("--optimizer sso"),
    ),
    _picture(
        "trials",
        "Trials of the solver",
        Quantity("num_trials", "trials a step", middle=np.nanmean),
        "The tracking solver takes the same few trials at every step; bisection's number may vary.",
        _of("--optimizer sso"),
    ),
    _picture(
        "nuclear_rank",
        "Nuclear rank of the momentum",
        Quantity("nuclear_rank", "nuclear rank of M", is_shared=False),
        "The nuclear rank stays well above 1: a momentum of a single direction tells little of the others.",
        _ON_SPHERES,
    ),
    _picture(
        "spike_share",
        "Share of the spike",
        Quantity("spike_share", "share of the momentum"),
        "The spike's share of the momentum is steady over training.",
        _of("--optimizer spectra"),
    ),
    _picture(
        "clipped_share",
        "Share of the update that is clipped",
        Quantity("clipped_share", "clipped share"),
        "Some of the update is clipped, and about as much of it from warmup to the end.",
        _of("--optimizer spectra_clip_adamw, _signum or _ademamix"),
    ),
    _picture(
        "divided",
        "Matrices whose gradient is divided",
        Quantity("divided", "share of the matrices", middle=np.nanmean),
        "Few gradients are divided beside those of every period's step.",
        _of("--optimizer spectral_adam"),
    ),
]
