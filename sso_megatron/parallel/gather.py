"""Whole matrices from shards, and back: the ``duplicated`` placement."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_shards(shards: Tensor, partition_dim: int, tp_group: dist.ProcessGroup) -> Tensor:
    """Whole matrices on every rank of the group.

    Collectives: one all-gather of ``shards`` over ``tp_group``.

    Args:
        shards: ``(b, m, n)``, this rank's part of ``b`` matrices, the same shape on every rank.
        partition_dim: 0 when the rows are cut, 1 when the columns are.
        tp_group: ranks in shard order.

    Returns:
        ``(b, m * size, n)`` or ``(b, m, n * size)``.
    """
    size = dist.get_world_size(tp_group)
    gathered = shards.new_empty((size * shards.size(0), *shards.shape[1:]))
    dist.all_gather_into_tensor(gathered, shards.contiguous(), group=tp_group)
    return torch.cat(gathered.chunk(size), dim=partition_dim + 1)


def take_shard(whole: Tensor, partition_dim: int, tp_group: dist.ProcessGroup) -> Tensor:
    """This rank's part of whole matrices; the inverse of ``gather_shards``. No collective.

    Args:
        whole: ``(b, m, n)``.
        partition_dim: 0 when the rows are cut, 1 when the columns are.
        tp_group: ranks in shard order.
    """
    size, rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
    return whole.chunk(size, dim=partition_dim + 1)[rank]
