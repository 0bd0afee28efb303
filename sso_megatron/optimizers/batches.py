"""Batches of equal logical matrices: what a step works on in one go, and where."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sso_megatron.matrices.layout import ParameterLayout, Split
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.parallel.cost import PolarWork, cheapest_mode
from sso_megatron.parallel.placement import PLACEMENTS, Local, Placement
from sso_megatron.parallel.shards import Shards, group_rank, group_size

# Tensors of a matrix's size that a step holds at once: weight, momentum direction, its normalised
# form, the shifted matrix, two iterates, the accepted update, and the products' temporaries.
_WORKSPACE_COPIES = 12
# And of its Gram matrix's size, where shards stay in place.
_GRAM_COPIES = 8


@dataclass(frozen=True)
class Member:
    """One logical matrix of a batch."""

    param: Tensor
    layout: ParameterLayout
    split: Split

    @property
    def name(self) -> str:
        """Global name of the logical matrix."""
        return self.layout.matrix_name(self.split)


@dataclass
class MatrixBatch:
    """Logical matrices of one shape, placement and parameter group, worked on in one go.

    Attributes:
        members: by name, so that every rank of ``tp_group`` has the same order.
        group: their parameter group.
        placement: which of them this rank works on, and how they get there.
        shards: how they are cut; None when they lie whole on this rank.
        mode: name of the placement, ``local`` when they lie whole on this rank.
        cache: what the algorithm keeps for this batch from step to step; None before the first.
        stats: what the last step reported, one entry for each of ``here``; None before the first.
    """

    members: list[Member]
    group: dict[str, Any]
    placement: Placement
    shards: Shards | None
    mode: str
    cache: Any = None
    stats: Any = field(default=None, repr=False)

    @property
    def here(self) -> list[Member]:
        """The members that this rank works on: all but for ``owner``."""
        return [self.members[i] for i in self.placement.members]

    @property
    def shape(self) -> tuple[int, int]:
        """Global ``(d_out, d_in)``."""
        return self.members[0].split.shape

    @property
    def dtype(self) -> torch.dtype:
        """What is worked in: float32, or float64 for float64 parameters."""
        return torch.promote_types(self.members[0].param.dtype, torch.float32)

    def read(self, stored: Iterable[Tensor]) -> Tensor:
        """This rank's part of every member, ``(b, rows, columns)``, from tensors of parameter shape."""
        parts = [m.split.read(t).to(self.dtype) for m, t in zip(self.members, stored, strict=True)]
        return torch.stack(parts if self.shards is None else [self.shards.pad(part) for part in parts])

    def weights(self) -> Tensor:
        """This rank's part of every weight, a copy."""
        return self.read(member.param.detach() for member in self.members)

    def write_(self, values: Tensor) -> None:
        """Put what ``read`` gave back into the parameters.

        A parameter without a gradient is left as it is, as every torch optimizer does.
        """
        for member, value in zip(self.members, values, strict=True):
            if member.param.grad is not None:
                member.split.write_(member.param.detach(), value)

    def whole(self, parts: Tensor) -> Tensor:
        """Whole matrices ``(b, d_out, d_in)`` on every rank, from what ``read`` gives; for looking at.

        Collectives: one all-gather where the members are cut.
        """
        return parts if self.shards is None else self.shards.gather(parts.unsqueeze(0))[0]


def make_batches(
    groups: list[dict[str, Any]],
    find_layout: Callable[[dict[str, Any], int], ParameterLayout],
    shared: SpectralConfig,
    work: PolarWork,
) -> list[MatrixBatch]:
    """All logical matrices of the groups in batches.

    The ranks of a tensor-parallel group make the same batches in the same order, whatever the order
    of their parameters: a batch's collectives are issued in that order.

    Args:
        groups: parameter groups of the optimizer.
        find_layout: layout of the parameter at a place in a group.
        shared: placement and workspace.
        work: what a step on one matrix does, for the cost model.
    """
    by_key: dict[tuple[Any, ...], list[Member]] = {}
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            layout = find_layout(group, position)
            for split in layout.splits:
                if shared.tp_mode == "blockwise" and split.partition_dim is not None:
                    split = _block(split, layout.tp_group)
                if split.partition_dim is None and not split.rows:
                    continue
                dim = -1 if split.partition_dim is None else split.partition_dim
                uneven = split.shard_rows is not None
                order = (index, split.shape, dim, uneven, str(param.dtype), str(param.device))
                key = (order, id(layout.tp_group) if dim >= 0 else None)
                by_key.setdefault(key, []).append(Member(param, layout, split))
    return [
        batch
        for key, members in sorted(by_key.items(), key=lambda item: item[0][0])
        for batch in _place(sorted(members, key=lambda m: m.name), groups[key[0][0]], shared, work)
    ]


def _block(split: Split, tp_group: Any) -> Split:
    """This rank's shard as a matrix of its own."""
    rows = sum(stop - start for start, stop in split.rows)
    columns = split.shape[1] // (group_size(tp_group) if split.partition_dim == 1 else 1)
    block = f"block{group_rank(tp_group)}"
    return Split(f"{split.label}.{block}" if split.label else block, split.rows, (rows, columns), None)


def _place(
    members: list[Member], group: dict[str, Any], shared: SpectralConfig, work: PolarWork
) -> Iterator[MatrixBatch]:
    """Batches within the workspace, each with its placement."""
    first = members[0]
    d_out, d_in = first.split.shape
    itemsize = torch.promote_types(first.param.dtype, torch.float32).itemsize
    dim, tp_group = first.split.partition_dim, first.layout.tp_group
    mode, num_bytes = "local", _WORKSPACE_COPIES * d_out * d_in * itemsize
    if dim is not None:
        tp_size = group_size(tp_group)
        mode = shared.tp_mode
        if mode == "auto":
            mode = cheapest_mode(
                len(members),
                first.split.shape,
                dim,
                tp_size,
                work=work,
                flops_per_byte=shared.flops_per_byte,
            )
        if mode != "duplicated":
            num_bytes //= tp_size
        if mode == "distributed":
            num_bytes += _GRAM_COPIES * first.split.shape[1 - dim] ** 2 * itemsize
    size = max(1, (shared.workspace_mib << 20) // num_bytes)
    for start in range(0, len(members), size):
        part = members[start : start + size]
        if dim is None:
            yield MatrixBatch(part, group, Local(len(part)), None, mode)
            continue
        uneven = [m.split.shard_rows for m in part if m.split.shard_rows is not None]
        shards = Shards(first.split.shape, dim, tp_group, uneven or None, first.param.device)
        yield MatrixBatch(part, group, PLACEMENTS[mode](len(part), shards), shards, mode)
