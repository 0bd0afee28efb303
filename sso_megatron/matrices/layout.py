"""Where the logical matrices of a stored parameter lie, and their global shapes.

Megatron fuses several matrices into one parameter and tensor parallelism cuts parameters into shards.
A ``Split`` says which rows of this rank's shard belong to one logical matrix, and which dimension of
that matrix, if any, continues on the other ranks of the tensor-parallel group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Split:
    """One logical matrix of a stored parameter, as this rank sees it.

    Attributes:
        label: which part it is, ``""`` for a whole parameter, else ``q3``, ``gate`` and so on.
        rows: row ranges of the stored local tensor, put under each other.
        shape: global ``(d_out, d_in)``, which radius and scale are taken from.
        partition_dim: dimension that is cut over the group; None when the matrix is whole here.
    """

    label: str
    rows: Rows
    shape: tuple[int, int]
    partition_dim: int | None

    def read(self, stored: Tensor) -> Tensor:
        """This rank's part of the logical matrix from the stored ``(rows, d_in)`` tensor.

        A view where the rows are contiguous, a copy where they are not.
        """
        parts = [stored[start:stop] for start, stop in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write_(self, stored: Tensor, values: Tensor) -> None:
        """Put this rank's part back; the inverse of ``read``, converting to the stored dtype."""
        offset = 0
        for start, stop in self.rows:
            stored[start:stop].copy_(values[offset : offset + stop - start])
            offset += stop - start


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
        """Global name of one logical matrix."""
        return f"{self.name}[{split.label}]" if split.label else self.name


def whole(shape: Sequence[int], partition_dim: int | None = None, tp_size: int = 1) -> Split:
    """The parameter as one matrix.

    Args:
        shape: stored local ``(rows, d_in)``.
        partition_dim: dimension cut over the tensor-parallel group, or None.
        tp_size: ranks of that group.
    """
    rows, columns = shape
    return Split("", ((0, rows),), _global_shape(rows, columns, partition_dim, tp_size), partition_dim)


def gate_up_splits(shape: Sequence[int], partition_dim: int | None, tp_size: int) -> tuple[Split, ...]:
    """Gate and up of a gated MLP's first layer; each rank stores its slice of both halves.

    Args:
        shape: stored local ``(2 * ffn / tp_size, d_in)``, gate first.
        partition_dim: 0 under tensor parallelism, or None.
        tp_size: ranks of the tensor-parallel group.

    Raises:
        ValueError: an odd number of rows.
    """
    rows, columns = shape
    if rows % 2:
        raise ValueError(f"a gated MLP stores two halves, but its weight has {rows} rows")
    half = rows // 2
    global_shape = _global_shape(half, columns, partition_dim, tp_size)
    return (
        Split("gate", ((0, half),), global_shape, partition_dim),
        Split("up", ((half, rows),), global_shape, partition_dim),
    )


def qkv_splits(
    shape: Sequence[int],
    *,
    sections: Sequence[tuple[str, int]],
    head_dim: int,
    granularity: str,
    tp_size: int,
    tp_rank: int,
) -> tuple[Split, ...]:
    """Logical matrices of a fused QKV weight, which is stored query group by query group.

    Args:
        shape: stored local ``(rows, d_in)``.
        sections: label and heads of each part of a group in stored order, such as
            ``[("q", 4), ("k", 1), ("v", 1)]``.
        head_dim: rows of a head.
        granularity: ``head``, ``group`` or ``component``.
        tp_size: ranks of the tensor-parallel group.
        tp_rank: this rank's place in it, which global head numbers follow from.

    Raises:
        ValueError: this rank does not hold a whole number of query groups.
    """
    rows, columns = shape
    group_rows = head_dim * sum(heads for _, heads in sections)
    if rows % group_rows:
        raise ValueError(
            f"this rank's {rows} rows are no whole number of query groups of {group_rows} rows; "
            "use a tensor-parallel size that divides the number of query groups, "
            "or --spectral-qkv-split whole"
        )
    num_groups = rows // group_rows
    ranges: dict[str, list[tuple[int, int]]] = {label: [] for label, _ in sections}
    splits: list[Split] = []
    for group in range(num_groups):
        start = group * group_rows
        global_group = tp_rank * num_groups + group
        for label, heads in sections:
            stop = start + heads * head_dim
            ranges[label].append((start, stop))
            if granularity == "group":
                part = Split(f"{label}{global_group}", ((start, stop),), (stop - start, columns), None)
                splits.append(part)
            elif granularity == "head":
                splits += [
                    Split(
                        f"{label}{global_group * heads + head}",
                        ((start + head * head_dim, start + (head + 1) * head_dim),),
                        (head_dim, columns),
                        None,
                    )
                    for head in range(heads)
                ]
            start = stop
    if granularity == "component":
        partition_dim = 0 if tp_size > 1 else None
        for label, heads in sections:
            global_rows = num_groups * heads * head_dim * tp_size
            part = Split(label, tuple(ranges[label]), (global_rows, columns), partition_dim)
            splits.append(part)
    return tuple(splits)


def _global_shape(rows: int, columns: int, partition_dim: int | None, tp_size: int) -> tuple[int, int]:
    return (
        rows * tp_size if partition_dim == 0 else rows,
        columns * tp_size if partition_dim == 1 else columns,
    )
