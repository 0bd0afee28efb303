"""The criterion that a run has recorded, module by module: table, numbers and heat map."""

import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_LAYER = re.compile(r"^(?P<stack>.*?)layers\.(?P<layer>\d+)\.(?P<module>.*)$")
_EXPERT = re.compile(r"(?<=experts\.)local_experts\.\d+\.|(?<=\.weight)\d+")


@dataclass(frozen=True)
class Cell:
    """A module of a layer: medians over its experts and over the iterations that were measured.

    Attributes:
        module: name without layer and expert numbers.
        layer: global number; None outside layers.
        nuclear_rank: of the gradient.
        stable_rank: of the incoming activations; None where these are not known.
        gain: nuclear rank by stable rank.
    """

    module: str
    layer: int | None
    nuclear_rank: float | None
    stable_rank: float | None
    gain: float | None


def read(folder: Path, since: int = 0) -> tuple[list[Cell], list[int]]:
    """Every module of every layer from a run's ``metrics.jsonl``, and the iterations measured.

    Args:
        folder: what ``--spectral-run-dir`` named.
        since: the first iteration to look at.

    Raises:
        ValueError: nothing was measured.
        OSError: the file cannot be read.
    """
    path = folder / "metrics.jsonl"
    records = {n: found for n, found in _records(path).items() if n >= since}
    if not records:
        when = f" from iteration {since} on" if since else ""
        raise ValueError(f"{path} has no criterion{when}; train with --log-spectral-criterion N")
    seen: dict[tuple[str, int | None], list[dict[str, float | None]]] = {}
    for record in records.values():
        for name, values in record.items():
            seen.setdefault(_place(name), []).append(values)
    cells = [
        Cell(module, layer, *(_median([v[key] for v in all_values]) for key in _VALUES))
        for (module, layer), all_values in seen.items()
    ]
    return cells, sorted(records)


def _records(path: Path) -> dict[int, dict[str, dict[str, float | None]]]:
    """The criterion by iteration; of one that a resumed run has done again, the last."""
    found = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # of a run that was killed while it wrote
            print(f"{path}, line {number} is not whole, and is left out", file=sys.stderr)
            continue
        if "criterion" in record:
            found[int(record["iteration"])] = record["criterion"]
    return found


_VALUES = ("nuclear_rank", "stable_rank", "gain")


def _place(name: str) -> tuple[str, int | None]:
    """Module and layer of a weight's name, and kind of matrix."""
    name = _EXPERT.sub("", name).replace(".weight", "")
    found = _LAYER.match(name)
    if found is None:
        return name, None
    stack = found["stack"].removeprefix("decoder.")
    return stack + found["module"], int(found["layer"])


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def modules(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells of each module, by layer, the modules as the first layer has them."""
    by_module: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: -1 if cell.layer is None else cell.layer):
        by_module.setdefault(cell.module, []).append(cell)
    return by_module


def verdict(cells: Sequence[Cell]) -> str:
    """What the criterion says of a module."""
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
    """Print a row for each module, medians over layers, or for each module of each layer."""
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
    """Draw the gain, layers down and modules across; the numbers stand in the cells.

    Args:
        path: picture to write.
        cells: from ``read``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_module = modules(cells)
    layers = sorted({cell.layer for cell in cells if cell.layer is not None})
    rows: list[int | None] = [*layers]
    if any(cell.layer is None for cell in cells):
        rows.append(None)
    gains = {(cell.module, cell.layer): cell.gain for cell in cells}
    logs = [
        [math.log2(gain) if (gain := gains.get((module, row))) else math.nan for module in by_module]
        for row in rows
    ]
    limit = max((abs(x) for row in logs for x in row if math.isfinite(x)), default=1.0) or 1.0
    figure, axis = plt.subplots(figsize=(2 + 0.75 * len(by_module), 2.5 + 0.3 * len(rows)))
    # Blue and orange: told apart by the colour-blind, and both dark at the ends beside the numbers.
    image = axis.imshow(logs, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    for y, row in enumerate(rows):
        for x, module in enumerate(by_module):
            gain = gains.get((module, row))
            if gain is not None:
                is_dark = abs(logs[y][x]) > 0.6 * limit
                text = f"{gain:.2g}"
                axis.text(x, y, text, ha="center", va="center", size=7, color="w" if is_dark else "k")
    axis.set_xticks(range(len(by_module)), list(by_module), rotation=60, ha="right", size=8)
    axis.set_yticks(range(len(rows)), ["-" if row is None else str(row) for row in rows], size=8)
    axis.set(ylabel="layer", title="Gain of a spectral update: nuclear rank of G / stable rank of A")
    bar = figure.colorbar(image, ax=axis)
    bar.set_label("log2 of the gain; above 0 it helps")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(folder: Path) -> None:
    """At the end of a run: print the table and write ``criterion.png`` into its folder."""
    try:
        cells, iterations = read(folder)
        print_table(cells, iterations, Console(width=200))
        draw(folder / "criterion.png", cells)
    except (ValueError, OSError) as error:  # it ended before the first measurement, or the disk is full
        print(f"sso_megatron: the criterion is not shown: {error}", flush=True)
