"""Whole matrices from the shards of a tensor-parallel group.

``(m, n)`` whole matrices are cut along dimension 0 (``m``) or 1 (``n``) over the ranks of a group, evenly
or not. Shards travel in flat buffers, one after the other, so that no shard is padded.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.linalg.polar import AllReduce


def group_size(tp_group: dist.ProcessGroup) -> int:
    """Return the number of ranks of a group."""
    return dist.get_world_size(tp_group)


def group_rank(tp_group: dist.ProcessGroup) -> int:
    """Return this rank's place in a group."""
    return dist.get_rank(tp_group)


def is_distributed_tensor(tensor: Tensor) -> bool:
    """Return whether a tensor is torch's ``DTensor``, of which a rank sees its shard alone."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported, there is none
    return module is not None and isinstance(tensor, module.DTensor)


def copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each tensor to its target, in few kernels where tensors are contiguous."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


@dataclass(frozen=True)
class Cut:
    """How a matrix is cut over the ranks of a group.

    Attributes:
        shape: global ``(m, n)``.
        dim: dimension that is cut.
        lengths: length of each rank's shard along ``dim``, in shard order; 0 where a rank holds nothing.
    """

    shape: tuple[int, int]
    dim: int
    lengths: tuple[int, ...]

    @property
    def is_long_side(self) -> bool:
        """Whether the longer side is cut; a square counts as longer along its rows."""
        return (self.shape[0] < self.shape[1]) == bool(self.dim)

    def shard_shape(self, rank: int) -> tuple[int, int]:
        """Return the shape of a rank's shard."""
        length = self.lengths[rank]
        return (self.shape[0], length) if self.dim else (length, self.shape[1])

    @property
    def largest_shape(self) -> tuple[int, int]:
        """Shape of the largest shard."""
        return self.shard_shape(self.lengths.index(max(self.lengths)))

    def numel(self, rank: int) -> int:
        """Return the number of elements of a rank's shard."""
        return self.lengths[rank] * self.shape[1 - self.dim]

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        """Return a rank's shard of ``(..., m, n)``, a view."""
        return whole.narrow(self.dim - 2, sum(self.lengths[:rank]), self.lengths[rank])


def even_cut(shape: tuple[int, int], dim: int, num_ranks: int) -> Cut:
    """Return a cut into equal shards."""
    return Cut(shape, dim, (shape[dim] // num_ranks,) * num_ranks)


class Shards:
    """How the matrices of a batch, all of one shape, are cut over the ranks of a group."""

    def __init__(self, cuts: Sequence[Cut], tp_group: dist.ProcessGroup) -> None:
        """Take the cut of each matrix, and the ranks in shard order."""
        self.cuts, self.tp_group = cuts, tp_group
        self.size, self.rank = group_size(tp_group), group_rank(tp_group)

    def allocate(self, num_tensors: int, **options: Any) -> tuple[Tensor, list[list[Tensor]]]:
        """Make a buffer for this rank's shards of ``num_tensors`` tensors of each matrix.

        Args:
            num_tensors: tensors of each matrix.
            options: dtype and device.

        Returns:
            The flat buffer, of equal size on every rank, and for each tensor its views for the shards, one
            view for each matrix.
        """
        buffer = torch.empty(num_tensors * self.padded_numel(self.cuts, self.size), **options)
        return buffer, self._views(buffer, self.rank, num_tensors)

    @staticmethod
    def padded_numel(cuts: Sequence[Cut], num_ranks: int) -> int:
        """Return the elements that each rank contributes to an all-gather: those of the fullest rank."""
        return max(sum(cut.numel(rank) for cut in cuts) for rank in range(num_ranks))

    def gather(self, buffer: Tensor, num_tensors: int, members: range) -> Tensor:
        """Return whole matrices from the buffers that the ranks have filled.

        Collectives: one all-gather over ``tp_group``.

        Args:
            buffer: from ``allocate``, filled.
            num_tensors: as given to ``allocate``.
            members: the ``b'`` matrices that this rank needs.

        Returns:
            ``(num_tensors, b', m, n)``.
        """
        gathered = buffer.new_empty(self.size * buffer.numel())
        dist.all_gather_into_tensor(gathered, buffer, group=self.tp_group)
        whole = buffer.new_empty((num_tensors, len(members), *self.cuts[0].shape))
        for rank, part in enumerate(gathered.chunk(self.size)):
            for shards, matrices in zip(self._views(part, rank, num_tensors), whole, strict=True):
                targets = [self.cuts[i].shard(matrices[place], rank) for place, i in enumerate(members)]
                copy_all_(targets, [shards[i] for i in members])
        return whole

    def _views(self, buffer: Tensor, rank: int, num_tensors: int) -> list[list[Tensor]]:
        views: list[list[Tensor]] = []
        offset = 0
        for _ in range(num_tensors):
            views.append([])
            for cut in self.cuts:
                views[-1].append(buffer[offset : offset + cut.numel(rank)].view(cut.shard_shape(rank)))
                offset += cut.numel(rank)
        return views


def all_reduce(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``part`` over a group; ``part`` may be overwritten.

    Collectives: one all-reduce, none over a group of one rank.
    """
    if group_size(group) == 1:
        return part
    part = part.contiguous()
    dist.all_reduce(part, group=group)
    return part


def sum_over(group: dist.ProcessGroup) -> AllReduce | None:
    """``all_reduce`` over a group; None for a group of one rank."""
    return None if group_size(group) == 1 else functools.partial(all_reduce, group=group)


def norms_of(vectors: Sequence[Tensor], tp_groups: Sequence[Any]) -> Tensor:
    """Return the Euclidean norms ``(b,)`` of vectors of one dtype, each cut over a group or whole.

    A vector is whole where its group is None. The ranks of a group list the vectors that it cuts in the
    same order.

    Collectives: one all-reduce over each group.
    """
    norms = list(torch._foreach_norm(list(vectors)))
    for group in dict.fromkeys(group for group in tp_groups if group is not None):
        places = [i for i, other in enumerate(tp_groups) if other is group]
        squares = torch.stack([norms[i] for i in places]).square()
        dist.all_reduce(squares, group=group)
        for i, norm in zip(places, squares.sqrt().unbind(), strict=True):
            norms[i] = norm
    return torch.stack(norms)
