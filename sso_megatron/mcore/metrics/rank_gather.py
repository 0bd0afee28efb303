"""Numbers of all ranks brought together in one all-gather, and reduced row by row on the host."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.matrices.names import natural_order

Key = tuple[str, int]
"""A row, and which part of it a rank has: parts of one row are reduced, copies of one part count once."""


@dataclass(frozen=True)
class Contribution:
    """What a rank contributes to a table, always the same.

    Attributes:
        keys: rows and parts that this rank sends numbers of.
        sums: columns whose parts add up; they come first.
        maxima: columns of whose parts the largest counts.
    """

    keys: Sequence[Key]
    sums: tuple[str, ...] = ()
    maxima: tuple[str, ...] = ()

    @property
    def num_columns(self) -> int:
        """Numbers of a row."""
        return len(self.sums) + len(self.maxima)

    @property
    def numel(self) -> int:
        """Numbers of this rank."""
        return len(self.keys) * self.num_columns


@dataclass(frozen=True)
class _Places:
    """Where the numbers of one sheet are among all ranks' numbers.

    Attributes:
        rows: names, in their natural order.
        first: ``(entries,)`` place of an entry's first number.
        row: ``(entries,)`` the row that an entry is part of.
    """

    rows: tuple[str, ...]
    first: np.ndarray
    row: np.ndarray


class RankGather:
    """Agrees once which rank sends what.

    Collectives: one gather of objects over the world at construction; ``vector`` and ``tables`` issue none.
    """

    def __init__(self, contributions: Mapping[str, Contribution]) -> None:
        """Take this rank's sheets; every rank has sheets of the same names, and those with keys columns."""
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, dict(contributions))
        # A rank that has no spectral weights does not know their columns.
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
        """This rank's numbers, ``(width,)`` float32, from ``(keys, columns)`` of each sheet."""
        parts = [values[name].float().flatten() for name in self._contributions]
        filled = sum(part.numel() for part in parts)
        return torch.cat([*parts, torch.zeros(self.width - filled, device=parts[0].device)])

    def tables(self, gathered: np.ndarray) -> dict[str, tuple[tuple[str, ...], dict[str, np.ndarray]]]:
        """Rows and columns ``(rows,)`` float64 of each sheet, from ``(world, width)`` numbers."""
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
