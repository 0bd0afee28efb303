"""Draws a model's health by layer: activations, attention logits, load of the experts."""

import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sso_megatron.cli.plot import axes as plot_axes
from sso_megatron.cli.plot.axes import Picture
from sso_megatron.runs import criterion_table
from sso_megatron.runs.reader import Run, TableHistory
from sso_megatron.runs.tables import ACTIVATIONS

_MEASURE = "train with --log-spectral-metrics N"
_PLACES = dict(zip(ACTIVATIONS, ("residual stream", "attention", "MLP"), strict=True))
_SIZES = {"rms": "RMS", "max": "AbsMax"}
_ACTIVATIONS = {
    f"{where}_{size}": f"{size_text}, {place}"
    for size, size_text in _SIZES.items()
    for where, place in _PLACES.items()
}
_MAX_LOAD = 2.0
"""Load at which the colours end; larger ones have the same colour."""


def over_training(runs: list[Run]) -> Figure | None:
    """Draw a panel for each size of activations: the mean, smallest and largest over layers."""
    return _activation_panels(runs, is_by_layer=False)


def by_layer(runs: list[Run]) -> Figure | None:
    """Draw a panel for each size of activations by layer: last values; of a single run also the first."""
    return _activation_panels(runs, is_by_layer=True)


def _activation_panels(runs: list[Run], is_by_layer: bool) -> Figure | None:
    if not _known(runs, "layers", _ACTIVATIONS):
        return None
    figure, axes = plot_axes.panels(len(_ACTIVATIONS), across=3, width=4.0, height=2.7)
    for axis, (column, title) in zip(axes, _ACTIVATIONS.items(), strict=True):
        for number, run in enumerate(runs):
            if is_by_layer:
                _draw_layers(axis, run, run.tables["layers"], column, number, with_first=len(runs) == 1)
            else:
                _draw_mean(axis, run, run.tables["layers"], column, number)
        axis.set_title(title)
        if is_by_layer:
            axis.set_xlabel("layer")
            plot_axes.whole_numbers(axis)
        else:
            plot_axes.label_iterations(axis)
        plot_axes.log_if_wide(axis)
    plot_axes.legend(figure)
    return figure


def over_training_and_layers(runs: list[Run], table: str, column: str, label: str) -> Figure | None:
    """Draw two panels: a column's mean over training, and its last values by layer."""
    if not _known(runs, table, {column: label}):
        return None
    figure, axes = plot_axes.panels(2, across=2, width=5.0, height=3.0)
    for number, run in enumerate(runs):
        _draw_mean(axes[0], run, run.tables[table], column, number)
        _draw_layers(axes[1], run, run.tables[table], column, number, with_first=False)
    plot_axes.label_iterations(axes[0])
    axes[0].set(title="mean over layers, smallest to largest", ylabel=label)
    axes[1].set(title="last measurement", xlabel="layer")
    plot_axes.whole_numbers(axes[1])
    plot_axes.legend(figure)
    return figure


def _known(runs: list[Run], table: str, columns: dict[str, str]) -> bool:
    tables = [run.tables[table].columns for run in runs]
    return any(np.isfinite(found[c]).any() for found in tables for c in columns if c in found)


def _draw_mean(axis: Axes, run: Run, table: TableHistory, column: str, number: int) -> None:
    if column in table.columns:
        spread = plot_axes.spread_of(table.columns[column], np.nanmean)
        plot_axes.band(axis, table.iterations, spread, number, run.name)


def _draw_layers(
    axis: Axes, run: Run, table: TableHistory, column: str, number: int, with_first: bool
) -> None:
    if column not in table.columns:
        return
    layers, order = _layers(table.rows)
    values = table.columns[column][:, order]
    if with_first and len(values) > 1:
        label = f"iteration {table.iterations[0]}"
        axis.plot(layers, values[0], color="#777777", ls=(0, (2, 1.2)), lw=1.2, label=label)
    label = f"iteration {table.iterations[-1]}" if with_first else plot_axes.shown_name(run.name)
    plot_axes.line(axis, layers, values[-1], number, label)


def _layers(rows: list[str]) -> tuple[np.ndarray, list[int]]:
    """Return the layers' numbers, ascending, the decoder's first, and the rows' indices in that order."""

    def number(name: str) -> int:
        found = re.search(r"layers\.(\d+)$", name)
        return int(found[1]) if found else -1

    order = sorted(range(len(rows)), key=lambda i: (not rows[i].startswith("decoder."), number(rows[i])))
    numbers: list[int] = []
    for i in order:  # layers of multi-token prediction are numbered on after the decoder's
        own = number(rows[i])
        numbers.append(own if not numbers or own > numbers[-1] else numbers[-1] + 1)
    return np.array(numbers), order


def expert_load(runs: list[Run]) -> Figure | None:
    """Draw a heat map for each run, with a row for each layer and a column for each expert."""
    loads = {run.name: run.tables["experts"].last["load"] for run in runs if _has_load(run)}
    if not loads:
        return None
    height = max(1.6, min(6.0, 0.3 * max(map(len, loads.values()))))
    figure, axes = plot_axes.panels(len(loads), across=2, width=5.5, height=height + 0.5)
    for axis, (name, by_row) in zip(axes, loads.items(), strict=True):
        layers, order = _layers(list(by_row))
        values = np.array([list(by_row.values())[i] for i in order], float)
        image = axis.imshow(values, cmap="viridis", vmin=0, vmax=_MAX_LOAD, aspect="auto")
        dead_layers, dead_experts = np.nonzero(values == 0)
        axis.plot(dead_experts, dead_layers, "x", color="w", ms=5)
        last = max(i for i in next(r for r in runs if r.name == name).tables["experts"].iterations)
        axis.set(xlabel="expert", ylabel="layer", title=f"{plot_axes.shown_name(name)}, iteration {last}")
        axis.set_yticks(*_ticks(layers))
        plot_axes.whole_numbers(axis)
        axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, extend="max", shrink=0.8)
    bar.set_label("tokens, by the mean")
    return figure


def _has_load(run: Run) -> bool:
    return bool(run.tables["experts"].last.get("load"))


def _ticks(layers: np.ndarray) -> tuple[list[int], list[str]]:
    every = max(1, len(layers) // 10)
    places = list(range(0, len(layers), every))
    return places, [str(layers[i]) for i in places]


def criterion(runs: list[Run]) -> Figure | None:
    """Draw the criterion's heat map of each run that has recorded it."""
    some = {plot_axes.shown_name(run.name): run.criterion for run in runs if run.criterion}
    return criterion_table.figure_of(some) if some else None


PICTURES = [
    Picture(
        "activations",
        "Activations over training",
        "Every size settles after warmup; an AbsMax that keeps climbing while the RMS stays is a growing "
        "outlier.",
        _MEASURE,
        over_training,
    ),
    Picture(
        "activations_by_layer",
        "Activations by layer",
        "Neighbouring layers differ little, the residual stream grows evenly with depth, and no layer is "
        "off.",
        _MEASURE,
        by_layer,
    ),
    Picture(
        "logits",
        "Largest attention logit",
        "The largest logit levels off, with QK norm below some tens; hundreds make attention pick a single "
        "token.",
        _MEASURE,
        lambda runs: over_training_and_layers(runs, "layers", "logit_max", "largest logit"),
    ),
    Picture(
        "max_vio",
        "Balance of the experts: MaxVio",
        "MaxVio, the busiest expert's load above the mean by the mean, falls within the first few hundred "
        "iterations and stays well below 1.",
        f"{_MEASURE} on a model with routed experts",
        lambda runs: over_training_and_layers(runs, "experts", "max_vio", "MaxVio"),
    ),
    Picture(
        "expert_load",
        "Load of the experts",
        "Every row has about one colour, that of 1; a cross is an expert that got no token.",
        f"{_MEASURE} on a model with routed experts",
        expert_load,
    ),
    Picture(
        "criterion",
        "Gain of a spectral update",
        "Where the gain is above 1, a spectral update should help; docs/algorithms/criterion.md says more.",
        "train with --log-spectral-criterion N",
        criterion,
    ),
]
