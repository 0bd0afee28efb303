"""The spectral criterion that a run has recorded, by module and layer: numbers, table and heat map."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from sso_megatron.runs.file_format import CRITERION_PICTURE, METRICS
from sso_megatron.runs.json_lines import by_iteration, read_lines
from sso_megatron.runs.module_names import place_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """A module of a layer: medians over its experts and over the iterations that were measured.

    Attributes:
        module: name without layer and expert numbers.
        layer: global number; None outside layers.
        nuclear_rank: nuclear rank of the gradient.
        stable_rank: stable rank of the incoming activations; None where these are not known.
        gain: nuclear rank by stable rank.
    """

    module: str
    layer: int | None
    nuclear_rank: float | None
    stable_rank: float | None
    gain: float | None


def read(folder: Path, since: int = 0) -> tuple[list[Cell], list[int]]:
    """Read a run's ``metrics.jsonl``: a cell for every module of every layer, and the measured iterations.

    Args:
        folder: what ``--spectral-run-dir`` named.
        since: iterations before this one are left out.

    Raises:
        ValueError: the criterion was not measured.
        OSError: the file is missing or cannot be read.
    """
    path = folder / METRICS
    found = by_iteration(read_lines(path))
    records = {n: line["criterion"] for n, line in found.items() if n >= since and "criterion" in line}
    if not records:
        when = f" from iteration {since} on" if since else ""
        raise ValueError(f"{path} has no criterion{when}; train with --log-spectral-criterion N")
    return cells_from(records.values()), sorted(records)


def cells_from(records: Iterable[dict[str, dict[str, float | None]]]) -> list[Cell]:
    """Sum up records in a cell for every module of every layer.

    Args:
        records: the field ``criterion`` of each measured line of ``metrics.jsonl``.
    """
    seen: dict[tuple[str, int | None], list[dict[str, float | None]]] = {}
    for record in records:
        for name, values in record.items():
            seen.setdefault(place_of(name), []).append(values)
    return [
        Cell(module, layer, *(_median([v[key] for v in all_values]) for key in _VALUES))
        for (module, layer), all_values in seen.items()
    ]


_VALUES = ("nuclear_rank", "stable_rank", "gain")


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def modules(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Group cells by module, each group in the order of layers, modules in the order of the first layer."""
    by_module: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: -1 if cell.layer is None else cell.layer):
        by_module.setdefault(cell.module, []).append(cell)
    return by_module


def verdict(cells: Sequence[Cell]) -> str:
    """Say in a few words whether a spectral update helps a module, from its cells."""
    gains = [cell.gain for cell in cells if cell.gain is not None]
    if not gains:
        return "not known"
    count = sum(gain >= 1 for gain in gains)
    if count in (0, len(gains)):
        return "helps" if count else "does not help"
    return f"helps in {count} of {len(gains)} layers"


def print_table(
    cells: Sequence[Cell], iterations: Sequence[int], console: Console, *, by_layer: bool = False
) -> None:
    """Print a table with a row for each module.

    Args:
        cells: the cells that ``read`` returned.
        iterations: the iterations that ``read`` returned.
        console: console to print on.
        by_layer: a row for each module of each layer, instead of medians over layers.
    """
    when = f"iteration {iterations[0]}" if len(iterations) == 1 else f"{len(iterations)} iterations"
    if len(iterations) > 1:
        when += f" from {iterations[0]} to {iterations[-1]}"
    table = Table(
        title=f"spectral criterion, medians of {when}",
        title_justify="left",
        box=box.SIMPLE if console.is_terminal else None,
        pad_edge=False,
    )
    table.add_column("module", no_wrap=True)
    for column in ("layer", "nr(G)", "st(A)", "gain", "least", "most"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("a spectral update", no_wrap=True)
    for module, all_cells in modules(cells).items():
        for some in [[cell] for cell in all_cells] if by_layer else [all_cells]:
            gains = [cell.gain for cell in some if cell.gain is not None]
            layers = sorted(cell.layer for cell in some if cell.layer is not None)
            table.add_row(
                module,
                "-" if not layers else str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}",
                *(_shown(_median([getattr(cell, key) for cell in some])) for key in _VALUES),
                _shown(min(gains, default=None)),
                _shown(max(gains, default=None)),
                verdict(some),
            )
    console.print(table)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def draw(path: Path, cells: Sequence[Cell]) -> None:
    """Draw the gains as a heat map with a row for each layer and a column for each module.

    Args:
        path: picture to write.
        cells: from ``read``.
    """
    figure_of({"": cells}).savefig(path, dpi=120)


def figure_of(runs: Mapping[str, Sequence[Cell]]) -> "Figure":
    """Draw the heat maps of several runs, by name, below each other."""
    from matplotlib.figure import Figure

    tables = {name: _gains(cells) for name, cells in runs.items()}
    widths = [2 + 0.75 * len(modules) for modules, _, _ in tables.values()]
    heights = [2.5 + 0.3 * len(rows) for _, rows, _ in tables.values()]
    figure = Figure(figsize=(max(widths), sum(heights)), layout="constrained")
    all_axes = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    title = "Gain of a spectral update: nuclear rank of G / stable rank of A"
    for axis, (name, table) in zip(all_axes, tables.items(), strict=True):
        _draw_heat_map(axis, *table)
        axis.set_title(f"{name}\n{title}" if name else title)
    return figure


_MAX_ROWS = 40
"""Most rows of a heat map; in a deeper model a row is the median of several layers."""


def _gains(cells: Sequence[Cell]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Names of modules, names of rows (a layer or consecutive layers), and each pair's median gain."""
    layers = sorted({cell.layer for cell in cells if cell.layer is not None})
    size = math.ceil(len(layers) / _MAX_ROWS) or 1
    blocks: list[list[int | None]] = [[*layers[i : i + size]] for i in range(0, len(layers), size)]
    if any(cell.layer is None for cell in cells):
        blocks.append([None])
    by_module = modules(cells)
    rows = [str(b[0]) if len(b) == 1 else f"{b[0]}-{b[-1]}" for b in blocks]
    gains = [
        [_median([cell.gain for cell in found if cell.layer in block]) for found in by_module.values()]
        for block in blocks
    ]
    return list(by_module), ["-" if row == "None" else row for row in rows], gains


def _draw_heat_map(
    axis: "Axes", by_module: list[str], rows: list[str], gains: list[list[float | None]]
) -> None:
    logs = [[math.log2(gain) if gain else math.nan for gain in row] for row in gains]
    limit = max((abs(x) for row in logs for x in row if math.isfinite(x)), default=1.0) or 1.0
    # Blue and orange: told apart by the colour-blind, and both dark at the ends beside the numbers.
    image = axis.imshow(logs, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    axis.grid(visible=False)
    for y, row in enumerate(gains):
        for x, gain in enumerate(row):
            if gain is not None:
                color = "w" if abs(logs[y][x]) > 0.6 * limit else "k"
                axis.text(x, y, f"{gain:.2g}", ha="center", va="center", size=7, color=color)
    axis.set_xticks(range(len(by_module)), by_module, rotation=60, ha="right", size=8)
    axis.set_yticks(range(len(rows)), rows, size=8)
    axis.set_ylabel("layer")
    bar = axis.figure.colorbar(image, ax=axis)
    bar.set_label("log2 of the gain")


def show(folder: Path) -> None:
    """Print the table and write ``criterion.png`` into the run's folder; a failure is one printed line."""
    try:
        cells, iterations = read(folder)
        print_table(cells, iterations, Console(width=200))
        draw(folder / CRITERION_PICTURE, cells)
    except (ValueError, OSError) as error:  # it ended before the first measurement, or the disk is full
        print(f"sso_megatron: the criterion is not shown: {error}", flush=True)
