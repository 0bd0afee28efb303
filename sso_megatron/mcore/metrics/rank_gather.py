"""Numbers of all ranks, brought together in one all-gather and reduced row by row on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.matrices.names import natural_order

Key = tuple[str, int]
"""Name of a row and number of its part: parts of a row are reduced, copies of a part count once."""


@dataclass(frozen=True)
class Contribution:
    """The numbers that a rank contributes to a table, the same ones at every measurement.

    Attributes:
        keys: rows and parts that this rank sends numbers for.
        sums: columns whose parts are added; they come first.
        maxima: columns for which the largest part counts.
    """

    keys: Sequence[Key]
    sums: tuple[str, ...] = ()
    maxima: tuple[str, ...] = ()

    @property
    def num_columns(self) -> int:
        """Count of numbers for each key."""
        return len(self.sums) + len(self.maxima)

    @property
    def numel(self) -> int:
        """Count of numbers that this rank sends."""
        return len(self.keys) * self.num_columns


@dataclass(frozen=True)
class _Places:
    """The places of one table's numbers among all ranks' numbers.

    Attributes:
        rows: names of rows, in their natural order.
        first: ``(keys,)`` index of each key's first number.
        row: ``(keys,)`` index in ``rows`` of each key's row.
    """

    rows: tuple[str, ...]
    first: np.ndarray
    row: np.ndarray


def gather_objects[T](mine: T) -> list[T]:
    """Return the objects of all ranks, in the order of ranks.

    Collectives: one all-gather of objects over the world.
    """
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    return everywhere


def gather_vectors(vector: Tensor) -> Tensor:
    """Return vectors ``(n,)`` of all ranks as ``(world, n)``, without waiting for the device.

    Collectives: one all-gather over the world.
    """
    gathered = vector.new_empty(dist.get_world_size(), vector.numel())
    dist.all_gather_into_tensor(gathered.view(-1), vector)
    return gathered


class RankGather:
    """Keeps the order of the numbers that ranks send, on which all ranks agree once.

    Collectives: one all-gather of objects over the world at construction; ``vector`` and ``tables`` issue
    none.
    """

    def __init__(self, contributions: Mapping[str, Contribution]) -> None:
        """Agree on an order, from each rank's contributions by table; all ranks have the same tables."""
        everywhere = gather_objects(dict(contributions))
        # A rank without spectral weights does not know their columns.
        self._contributions = {
            name: next((found[name] for found in everywhere if found[name].num_columns), contribution)
            for name, contribution in contributions.items()
        }
        self.width = max(sum(contribution.numel for contribution in found.values()) for found in everywhere)
        self._places = {name: self._find(name, everywhere) for name in contributions}

    def _find(self, name: str, everywhere: list[dict[str, Contribution]]) -> _Places:
        found: dict[Key, int] = {}
        for rank, theirs in enumerate(everywhere):
            start = rank * self.width
            for other, contribution in theirs.items():
                if other == name:
                    for k, key in enumerate(contribution.keys):
                        found.setdefault(key, start + k * contribution.num_columns)
                    break
                start += contribution.numel
        rows = sorted({row for row, _ in found}, key=natural_order)
        places = {row: place for place, row in enumerate(rows)}
        first = np.fromiter(found.values(), dtype=np.int64, count=len(found))
        return _Places(tuple(rows), first, np.array([places[row] for row, _ in found], dtype=np.int64))

    def vector(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return this rank's numbers, ``(width,)`` float32, from ``(keys, columns)`` of each table."""
        parts = [values[name].float().flatten() for name in self._contributions]
        filled = sum(part.numel() for part in parts)
        return torch.cat([*parts, torch.zeros(self.width - filled, device=parts[0].device)])

    def tables(self, gathered: np.ndarray) -> dict[str, tuple[tuple[str, ...], dict[str, np.ndarray]]]:
        """Return each table's rows and columns, ``(rows,)`` float64, from ``(world, width)`` numbers."""
        flat, tables = gathered.reshape(-1).astype(np.float64), {}
        for name, contribution in self._contributions.items():
            places = self._places[name]
            values = flat[places.first[:, None] + np.arange(contribution.num_columns)]
            sums = np.zeros((len(places.rows), len(contribution.sums)))
            np.add.at(sums, places.row, values[:, : len(contribution.sums)])
            maxima = np.full((len(places.rows), len(contribution.maxima)), -np.inf)
            np.maximum.at(maxima, places.row, values[:, len(contribution.sums) :])
            columns = dict(
                zip((*contribution.sums, *contribution.maxima), [*sums.T, *maxima.T], strict=True)
            )
            tables[name] = places.rows, columns
        return tables
