"""Whole matrices from the shards of a tensor-parallel group, and back.

``(b, m, n)`` whole matrices are cut along dimension 0 (``m``) or 1 (``n``) over the ``size`` ranks of a
group. Where a cut along the rows is uneven, shards are padded with zero rows to equal height.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def group_size(tp_group: dist.ProcessGroup) -> int:
    """Ranks of a group."""
    return dist.get_world_size(tp_group)


def group_ranks(tp_group: dist.ProcessGroup) -> tuple[int, ...]:
    """Its ranks in the world."""
    return tuple(dist.get_process_group_ranks(tp_group))


def group_rank(tp_group: dist.ProcessGroup) -> int:
    """This rank's place in a group."""
    return dist.get_rank(tp_group)


class Shards:
    """How the matrices of a batch are cut over the ranks of a group."""

    def __init__(
        self,
        shape: tuple[int, int],
        partition_dim: int,
        tp_group: dist.ProcessGroup,
        shard_rows: Sequence[Sequence[int]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Take the geometry.

        Args:
            shape: global ``(m, n)``.
            partition_dim: 0 when the rows are cut, 1 when the columns are.
            tp_group: ranks in shard order.
            shard_rows: for each matrix the rows on each rank, where they are not all the same.
            device: where the matrices are.
        """
        self.shape, self.partition_dim, self.tp_group = shape, partition_dim, tp_group
        self.size, self.rank = group_size(tp_group), group_rank(tp_group)
        self.height = shape[0] if partition_dim else shape[0] // self.size
        self._gather_index: Tensor | None = None
        if shard_rows is not None:
            self.height = max(max(rows) for rows in shard_rows)
            self._gather_index, self._cut_index = self._indices(shard_rows, device)

    def _indices(
        self, shard_rows: Sequence[Sequence[int]], device: torch.device | None
    ) -> tuple[Tensor, Tensor]:
        """Row of the padded shards for each row of the matrices, and the other way round.

        ``(b, m)`` into ``size * height`` padded rows; ``(b, size * height)`` into ``m + 1`` rows, of
        which the last is zero.
        """
        by_rows = {}  # layers repeat the same few cuts
        for rows in set(map(tuple, shard_rows)):
            starts = [0, *accumulate(rows)]
            places = [(r, i) for r in range(self.size) for i in range(self.height)]
            by_rows[rows] = (
                [r * self.height + i for r, i in places if i < rows[r]],
                [starts[r] + i if i < rows[r] else self.shape[0] for r, i in places],
            )
        gather, cut = zip(*(by_rows[tuple(rows)] for rows in shard_rows), strict=True)
        return torch.tensor(gather, device=device), torch.tensor(cut, device=device)

    def pad(self, part: Tensor) -> Tensor:
        """A part ``(rows, n)`` with zero rows below it to the common height."""
        missing = self.height - part.size(0) if self._gather_index is not None else 0
        return F.pad(part, (0, 0, 0, missing)) if missing else part

    def join(self, shards: Tensor, first: int = 0) -> Tensor:
        """Whole matrices from every rank's shard.

        Args:
            shards: ``(size, k, b, height, n)``, or ``(size, k, b, m, n / size)`` where columns are cut:
                ``k`` tensors of each of ``b`` matrices.
            first: place in the batch of the first of the ``b`` matrices.

        Returns:
            ``(k, b, m, n)``.
        """
        if self._gather_index is None:
            return torch.cat(shards.unbind(), dim=self.partition_dim - 2)
        padded = shards.movedim(0, 2).flatten(2, 3)
        return _take_rows(padded, self._gather_index[first : first + padded.size(1)])

    def cut(self, whole: Tensor, first: int = 0) -> Tensor:
        """Every rank's shard of whole matrices; the inverse of ``join``.

        Args:
            whole: ``(b, m, n)``.
            first: place in the batch of the first of the ``b`` matrices.

        Returns:
            ``(size, b, height, n)``, or ``(size, b, m, n / size)`` where columns are cut.
        """
        if self._gather_index is None:
            return torch.stack(whole.chunk(self.size, dim=self.partition_dim + 1))
        index = self._cut_index[first : first + whole.size(0)]
        return _take_rows(_zero_below(whole), index).unflatten(1, (self.size, self.height)).movedim(1, 0)

    def own(self, whole: Tensor) -> Tensor:
        """This rank's shard of the batch's whole matrices ``(b, m, n)``."""
        if self._gather_index is None:
            return whole.chunk(self.size, dim=self.partition_dim + 1)[self.rank]
        start = self.rank * self.height
        return _take_rows(_zero_below(whole), self._cut_index[:, start : start + self.height])

    def gather(self, shards: Tensor) -> Tensor:
        """Whole matrices of the batch on every rank.

        Collectives: one all-gather of ``shards`` over ``tp_group``.

        Args:
            shards: ``(k, b, height, n)`` or ``(k, b, m, n / size)``: ``k`` tensors of each matrix.

        Returns:
            ``(k, b, m, n)``.
        """
        gathered = shards.new_empty((self.size * shards.size(0), *shards.shape[1:]))
        dist.all_gather_into_tensor(gathered, shards.contiguous(), group=self.tp_group)
        return self.join(gathered.unflatten(0, (self.size, -1)))


def _zero_below(whole: Tensor) -> Tensor:
    """``(b, m, n)`` with one more row, of zeros."""
    return F.pad(whole, (0, 0, 0, 1))


def _take_rows(X: Tensor, index: Tensor) -> Tensor:
    """``X[..., i, index[i, j], :]`` for ``X`` ``(..., b, p, n)`` and ``index`` ``(b, m)``."""
    shape = (*X.shape[:-2], index.size(-1), X.size(-1))
    return X.gather(-2, index.unsqueeze(-1).expand(shape))
