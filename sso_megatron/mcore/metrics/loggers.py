"""Measurements for Megatron's own TensorBoard and Weights & Biases writers."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from sso_megatron.runs.module_names import place_of
from sso_megatron.runs.tables import EMPTY, Table, Tables, headlines


def writers() -> list[Any]:
    """Return functions ``write(numbers, iteration)`` that log numbers by tag; most ranks have none."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer

    found: list[Any] = []
    tensorboard, wandb = get_tensorboard_writer(), get_wandb_writer()
    if tensorboard:

        def to_tensorboard(numbers: dict[str, float], iteration: int) -> None:
            for tag, value in numbers.items():
                tensorboard.add_scalar(tag, value, iteration)

        found.append(to_tensorboard)
    if wandb:
        found.append(lambda numbers, iteration: wandb.log(numbers, iteration))
    return found


def numbers(tables: Tables) -> dict[str, float]:
    """Return numbers by tag: each column's median and largest magnitude over a module's matrices.

    Tags are ``spectral/<column>/<module>``, ``spectral-largest/<column>/<module>``, ``health/<headline>``
    and ``health/<column>/<layer>``.
    """
    found = {f"health/{name}": value for name, value in headlines(tables).items() if value is not None}
    for name, values in _by_module(tables["matrices"]):
        found[f"spectral/{name}"] = float(np.median(values))
        found[f"spectral-largest/{name}"] = float(np.abs(values).max())
    for table in (tables.get("layers", EMPTY), tables.get("experts", EMPTY)):
        for column, values in table.columns.items():
            if values.ndim == 1:
                found |= _by_row(column, table, values)
    return found


def _by_row(column: str, table: Table, values: np.ndarray) -> dict[str, float]:
    rows = zip(table.rows, values.tolist(), strict=True)
    return {f"health/{column}/{row}": value for row, value in rows if not np.isnan(value)}


@functools.lru_cache(maxsize=1)
def _places(rows: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the indices of each module's rows."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        found.setdefault(place_of(row)[0], []).append(place)
    return {module: np.array(places) for module, places in found.items()}


def _by_module(table: Table) -> Iterator[tuple[str, np.ndarray]]:
    for column, values in table.columns.items():
        for module, some in _places(table.rows).items():
            known = values[some][~np.isnan(values[some])]
            if known.size:
                yield f"{column}/{module}", known
