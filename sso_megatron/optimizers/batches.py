"""Batches of equal logical matrices: what a step works on in one go, and where."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sso_megatron.matrices.layout import ParameterLayout, Split
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.parallel.cost import PolarWork, mode_costs
from sso_megatron.parallel.placement import Local, Placement, place
from sso_megatron.parallel.shards import Shards, group_rank, group_ranks, group_size

# Tensors of a matrix's size that a step holds at once: weight, momentum direction, its normalised
# form, the shifted matrix, two iterates, the accepted update, and the products' temporaries.
_WORKSPACE_COPIES = 12
# What an owner holds beside its whole matrix: shards to send and receive.
_EXCHANGE_COPIES = 4
# Where shards stay: the momentum and its products in float64, and Gram matrices in float64.
_CUT_COPIES, _GRAM_COPIES = 20, 16


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
                ranks = group_ranks(layout.tp_group) if dim >= 0 else ()
                order = (index, split.shape, dim, uneven, str(param.dtype), str(param.device), ranks)
                key = (order, id(layout.tp_group) if dim >= 0 else None)
                by_key.setdefault(key, []).append(Member(param, layout, split))
    for members in by_key.values():
        members.sort(key=lambda member: member.name)
    # Not by id: it is this process's own. Groups of the same ranks are told apart by a name.
    ordered = sorted(by_key.items(), key=lambda item: (item[0][0], item[1][0].name))
    batches: list[MatrixBatch] = []
    num_owned = 0  # what does not divide over the owners goes to another one each time
    for (order, _), members in ordered:
        for batch in _place(members, groups[order[0]], shared, work, num_owned):
            num_owned += len(batch.members) if batch.mode == "owner" else 0
            batches.append(batch)
    return batches


def _block(split: Split, tp_group: Any) -> Split:
    """This rank's shard as a matrix of its own."""
    rows = sum(stop - start for start, stop in split.rows)
    columns = split.shape[1] // (group_size(tp_group) if split.partition_dim == 1 else 1)
    block = f"block{group_rank(tp_group)}"
    return Split(f"{split.label}.{block}" if split.label else block, split.rows, (rows, columns), None)


def _place(
    members: list[Member], group: dict[str, Any], shared: SpectralConfig, work: PolarWork, num_owned: int
) -> Iterator[MatrixBatch]:
    """Batches within the workspace, each with its placement."""
    split, device = members[0].split, members[0].param.device
    dim, tp_group = split.partition_dim, members[0].layout.tp_group
    workspace = shared.workspace_mib << 20
    num_bytes = split.shape[0] * split.shape[1]
    num_bytes *= torch.promote_types(members[0].param.dtype, torch.float32).itemsize
    if dim is None:
        for part in _parts(members, workspace // (_WORKSPACE_COPIES * num_bytes)):
            yield MatrixBatch(part, group, Local(len(part)), None, "local")
        return
    tp_size = group_size(tp_group)
    mode: str = shared.tp_mode
    if mode == "auto":
        batch = (len(members), split.shape, dim, tp_size)
        costs = mode_costs(*batch, work=work, flops_per_byte=shared.flops_per_byte)
        mode = min(costs, key=costs.__getitem__)
    if mode == "owner":  # in parts of which every rank owns as many matrices
        size = tp_size * max(1, workspace // ((_WORKSPACE_COPIES + _EXCHANGE_COPIES) * num_bytes))
    elif mode == "distributed":
        gram_bytes = num_bytes * split.shape[1 - dim] // split.shape[dim]
        size = workspace // (_CUT_COPIES * num_bytes // tp_size + _GRAM_COPIES * gram_bytes)
    else:
        size = workspace // (_WORKSPACE_COPIES * num_bytes)
    for part in _parts(members, size):
        uneven = [m.split.shard_rows for m in part if m.split.shard_rows is not None]
        shards = Shards(split.shape, dim, tp_group, uneven or None, device)
        yield MatrixBatch(part, group, place(mode, len(part), shards, num_owned % tp_size), shards, mode)
        num_owned += len(part)


def _parts(members: list[Member], size: int) -> Iterator[list[Member]]:
    for start in range(0, len(members), max(1, size)):
        yield members[start : start + max(1, size)]
