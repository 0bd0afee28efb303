"""Describes where the logical matrices of a stored parameter lie, and their global shapes.

Megatron fuses several matrices into one parameter and tensor parallelism cuts parameters into shards.
A ``Split`` says which rows of this rank's shard belong to one logical matrix, and which dimension of
that matrix, if any, continues on the other ranks of the tensor-parallel group. Experts packed into one
``(experts, d_out, d_in)`` tensor are seen as ``(experts * d_out, d_in)``.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

RowRanges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Split:
    """One logical matrix of a stored parameter, as this rank sees it.

    Attributes:
        label: name of the part, ``""`` for a whole parameter, else ``q3``, ``gate`` and so on.
        rows: row ranges of the stored local tensor, which make up this rank's part in this order; empty
            where only other ranks of the group hold rows of the matrix.
        shape: global ``(d_out, d_in)``, which radius and scale are taken from.
        partition_dim: dimension that is cut over the group; None when this rank holds the whole matrix.
        shard_rows: rows on each rank of the group, in shard order, where a cut along dimension 0 is
            uneven; None where every rank holds the same number.
    """

    label: str
    rows: RowRanges
    shape: tuple[int, int]
    partition_dim: int | None
    shard_rows: tuple[int, ...] | None = None

    def read(self, stored: Tensor) -> Tensor:
        """Return this rank's part of the logical matrix from the stored ``(..., rows, d_in)`` tensor.

        It is a view where the rows are contiguous, and a copy where they are not.
        """
        flat = stored.flatten(0, -2)
        parts = [run.reshape(-1, flat.size(1)) for run in self._runs(flat)]
        return parts[0] if len(parts) == 1 else torch.cat([flat[:0], *parts])

    def write_(self, stored: Tensor, values: Tensor) -> None:
        """Write this rank's part into the stored tensor, in its dtype; the inverse of ``read``.

        Args:
            stored: contiguous ``(..., rows, d_in)``.
            values: ``(k, d_in)``, ``k`` at least the rows of this part; further rows are ignored.
        """
        flat = stored.view(-1, stored.size(-1))
        offset = 0
        for run in self._runs(flat):
            count = run.shape[:-1].numel()
            run.copy_(values[offset : offset + count].reshape(run.shape))
            offset += count

    def _runs(self, flat: Tensor) -> list[Tensor]:
        """Return views of the rows: one ``(n, k, d_in)`` of equal ranges at equal distances, else one each.

        Alternating blocks of gate and up are a hundred ranges, which one copy then reads or writes.
        """
        if len(self.rows) > 1:
            (first, stop), (second, _), last = self.rows[0], self.rows[1], self.rows[-1][1]
            length, step = stop - first, second - first
            if self.rows == tuple((start, start + length) for start in range(first, last, step)):
                return [flat[first:last].unfold(0, length, step).transpose(1, 2)]
        return [flat[start:stop] for start, stop in self.rows]


@dataclass(frozen=True)
class ParameterLayout:
    """A stored parameter's global name, its logical matrices and the group that holds its shards.

    Attributes:
        name: global name, the same on every rank that holds a shard.
        splits: logical matrices; together they cover every row exactly once.
        tp_group: process group over which ``partition_dim`` is cut; None when nothing is.
    """

    name: str
    splits: tuple[Split, ...]
    tp_group: Any = None

    def matrix_name(self, split: Split) -> str:
        """Return the global name of one logical matrix."""
        return f"{self.name}[{split.label}]" if split.label else self.name


def whole(shape: Sequence[int], partition_dim: int | None = None, tp_size: int = 1) -> Split:
    """Return the parameter as one matrix.

    Args:
        shape: stored local ``(rows, d_in)``.
        partition_dim: dimension cut over the tensor-parallel group, or None.
        tp_size: ranks of that group.
    """
    rows, columns = shape
    return Split("", ((0, rows),), _global_shape(rows, columns, partition_dim, tp_size), partition_dim)


def gate_up_splits(
    shape: Sequence[int], partition_dim: int | None, tp_size: int, interleave: int = 0
) -> tuple[Split, ...]:
    """Return gate and up of a gated MLP's first layer; each rank stores its slice of both.

    Args:
        shape: stored local ``(2 * ffn / tp_size, d_in)``.
        partition_dim: 0 under tensor parallelism, or None.
        tp_size: ranks of the tensor-parallel group.
        interleave: rows of a block where blocks of gate and up take turns; 0 where all of gate lies
            above all of up.

    Raises:
        ValueError: the rows do not divide into gate and up.
    """
    rows, columns = shape
    block = interleave or rows // 2
    if rows % 2 or rows % (2 * block):
        stored = f"blocks of {interleave} rows in turn" if interleave else "two halves"
        raise ValueError(f"a gated MLP stores gate and up as {stored}, but its weight has {rows} rows")
    global_shape = _global_shape(rows // 2, columns, partition_dim, tp_size)
    starts = {"gate": range(0, rows, 2 * block), "up": range(block, rows, 2 * block)}
    return tuple(
        Split(label, tuple((start, start + block) for start in starts[label]), global_shape, partition_dim)
        for label in starts
    )


def section_splits(
    shape: Sequence[int], sections: Sequence[tuple[str, int]], partition_dim: int | None, tp_size: int
) -> tuple[Split, ...]:
    """Return matrices stored one below the other; each tensor-parallel rank stores a slice of each.

    Args:
        shape: stored local ``(rows, d_in)``.
        sections: label and global rows of each matrix, in stored order.
        partition_dim: 0 under tensor parallelism, or None.
        tp_size: ranks of the tensor-parallel group.

    Raises:
        ValueError: the sections do not divide over the ranks, or are not what is stored.
    """
    rows, columns = shape
    size = tp_size if partition_dim == 0 else 1
    total = sum(section_rows for _, section_rows in sections)
    if rows * size != total or any(section_rows % size for _, section_rows in sections):
        listed = " and ".join(f"{section_rows} ({label})" for label, section_rows in sections)
        raise ValueError(f"{rows} rows on each of {size} ranks do not hold {listed} rows in equal slices")
    splits, start = [], 0
    for label, section_rows in sections:
        stop = start + section_rows // size
        splits.append(Split(label, ((start, stop),), (section_rows, columns), partition_dim))
        start = stop
    return tuple(splits)


def row_splits(
    shape: Sequence[int], parts: Iterable[tuple[str, RowRanges]], *, tp_size: int, tp_rank: int
) -> tuple[Split, ...]:
    """Return the matrices of a parameter that is cut into equal blocks of rows, wherever they begin.

    A matrix whose rows are all in one rank's block is whole, and that rank alone lists it. Every other
    matrix is cut along dimension 0. All ranks list the cut matrices in the same order, which their
    collectives follow, ranks that hold none of a matrix's rows included.

    Args:
        shape: stored local ``(rows, d_in)``.
        parts: label of each matrix and where its rows lie in the whole parameter, ascending: then the
            shards in rank order make up the matrix in its own order.
        tp_size: ranks that the parameter is cut over.
        tp_rank: this rank's place among them.
    """
    rows, columns = shape
    splits = []
    for label, ranges in parts:
        held = [_within(ranges, rank * rows, (rank + 1) * rows) for rank in range(tp_size)]
        counts = tuple(sum(stop - start for start, stop in own) for own in held)
        global_shape = (sum(counts), columns)
        if max(counts) < sum(counts):
            is_even = len(set(counts)) == 1
            splits.append(Split(label, held[tp_rank], global_shape, 0, None if is_even else counts))
        elif counts[tp_rank]:
            splits.append(Split(label, held[tp_rank], global_shape, None))
    return tuple(splits)


def packed_splits(shape: Sequence[int], one: Sequence[Split], experts: Sequence[int]) -> tuple[Split, ...]:
    """Return the matrices of equal experts that are stored one below the other.

    Args:
        shape: stored local ``(experts, rows, d_in)`` or ``(experts * rows, d_in)``.
        one: the matrices of one expert, stored as ``(rows, d_in)``.
        experts: number of each expert in the whole model, which its label says.

    Raises:
        ValueError: the tensor does not hold that many experts.
    """
    rows, rest = divmod(math.prod(shape[:-1]), len(experts))
    if rest or (len(shape) == 3 and shape[0] != len(experts)):
        raise ValueError(f"a tensor of shape {tuple(shape)} does not hold {len(experts)} experts")
    return tuple(
        replace(
            split,
            label=f"expert{expert}.{split.label}" if split.label else f"expert{expert}",
            rows=tuple((place * rows + start, place * rows + stop) for start, stop in split.rows),
        )
        for place, expert in enumerate(experts)
        for split in one
    )


def _within(ranges: RowRanges, first: int, last: int) -> RowRanges:
    """Return the part of ``ranges`` within ``first .. last``, counted from ``first``."""
    cut = ((max(start, first) - first, min(stop, last) - first) for start, stop in ranges)
    return tuple((start, stop) for start, stop in cut if start < stop)


def _global_shape(rows: int, columns: int, partition_dim: int | None, tp_size: int) -> tuple[int, int]:
    return (
        rows * tp_size if partition_dim == 0 else rows,
        columns * tp_size if partition_dim == 1 else columns,
    )
