"""The places of whole matrices in the buffers of data parallelism, which decide what rank steps on each.

Megatron reduce-scatters gradients and all-gathers parameters by buffer: a buffer is a sequence of buckets,
and a bucket has one shard for each data-parallel rank. A matrix that lies in one shard reaches the rank
that steps on it whole, by the same collectives that split other parameters anywhere.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sso_megatron.matrices.layout import ParameterLayout
from sso_megatron.parallel.cost import PolarWork

# A parameter may start at multiples of this many elements in Megatron's distributed buffers.
_ALIGNMENT = 64
# A bucket takes further matrices until they would fill this fraction of its shards, if each shard were
# as large as the largest matrix: Megatron's own measure against padding.
_FILL = 0.9
_STEP = PolarWork(num_trials=1, num_steps=1)


def step_costs(layouts: Iterable[tuple[Tensor, ParameterLayout]]) -> dict[Tensor, float]:
    """Return the FLOPs of a Newton-Schulz step on each parameter, summed over its logical matrices.

    The rest of a spectral step is proportional to that cost or small, and tensor parallelism leaves every
    data-parallel rank the same share of it. Ranks of a tensor-parallel group must put a parameter into
    the same shard, since they work on it together, but may hold different matrices of it: the largest
    of their costs is used.

    Collectives: one all-gather of objects over each tensor-parallel group, dense parameters' group first.
    """
    by_kind: tuple[list[tuple[Tensor, ParameterLayout]], ...] = ([], [])
    for param, layout in layouts:
        by_kind[is_expert_parallel(param)].append((param, layout))
    costs: dict[Tensor, float] = {}
    for pairs in by_kind:
        if not pairs:
            continue
        local = [sum(_STEP.flops(split.shape) for split in layout.splits) for _, layout in pairs]
        tp_group = pairs[0][1].tp_group
        gathered: list[Any] = [None] * tp_group.size()
        torch.distributed.all_gather_object(gathered, local, group=tp_group)
        for (param, _), *figures in zip(pairs, *gathered, strict=True):
            costs[param] = max(figures)
    return costs


def is_expert_parallel(param: Tensor) -> bool:
    """Return whether the experts' own data-parallel group reduces the parameter's gradient."""
    return not getattr(param, "allreduce", True)


def owners(layout: Any) -> dict[Tensor, int]:
    """Return the data-parallel rank in whose shard each parameter of a buffer lies.

    Args:
        layout: Megatron's ``PerBufferParamLayout``, made by ``ShardLayout``.
    """
    found = {}
    for param, (start, _, bucket) in layout.param_index_map.items():
        first, last = layout.bucket_indices[bucket]
        found[param] = (start - first) // ((last - first) // layout.num_optimizer_shards)
    return found


class ShardLayout:
    """Lays out buffers of whole matrices so that every rank's spectral steps cost about the same.

    Rule: matrices go to the rank that has the least work so far, over all buckets and model chunks, the
    most expensive matrix first, but no bucket becomes larger than packing its matrices by size alone would
    make it. Where that limit allows no such assignment, or only a worse one, the matrices are packed by
    size, and the most expensive pack goes to the rank that has the least work.
    """

    def __init__(self, costs: dict[Tensor, float]) -> None:
        """Store the cost of a step on each parameter."""
        self._costs = costs
        self._work: dict[bool, list[float]] = {}  # of each rank; experts' apart, by their own group

    def per_buffer(
        self,
        params: Sequence[Tensor],
        bucket_size: int | None,
        data_parallel_world_size: int,
        ddp_config: Any,
        param_indices: list[int] | None = None,
    ) -> Any:
        """Return Megatron's ``PerBufferParamLayout`` of one buffer.

        It is called once for each buffer, in the order in which buffers are made.

        Args:
            params: the buffer's parameters in the model's order; the backward pass takes them in reverse.
            bucket_size: elements at which a bucket is full; None for a single bucket.
            data_parallel_world_size: number of shards in a bucket.
            ddp_config: Megatron's DDP configuration, which decides the padding of buckets.
            param_indices: passed through to the layout.
        """
        from megatron.core.optimizer.param_layout import PerBufferParamLayout, bucket_end_divisor

        num_shards = data_parallel_world_size
        pad_more = ddp_config.pad_buckets_for_high_nccl_busbw
        divisor = math.lcm(_ALIGNMENT, bucket_end_divisor(num_shards, pad_more) // num_shards)
        work = self._work.setdefault(is_expert_parallel(params[0]), [0.0] * num_shards)
        places: dict[Tensor, tuple[int, int, int]] = {}
        buckets: list[tuple[int, int]] = []
        sizes: list[int] = []
        end = 0
        for members in _buckets(params, bucket_size, num_shards):
            shards = self._assign(members, work)
            shard_size = _rounded(max(shard.end for shard in shards), divisor)
            for index, shard in enumerate(shards):
                work[index] += shard.cost
                for param, start in shard.places:
                    first = end + index * shard_size + start
                    places[param] = (first, first + param.numel(), len(buckets))
            buckets.append((end, end + num_shards * shard_size))
            sizes.append(sum(param.numel() for param in members))
            end = buckets[-1][1]
        layout = PerBufferParamLayout(
            param_index_map=places,
            bucket_indices=buckets,
            per_bucket_numel_unpadded=sizes,
            param_indices=param_indices or [],
        )
        layout.num_optimizer_shards = num_shards  # no field of it in 0.18
        return layout

    def _assign(self, members: list[Tensor], work: list[float]) -> "list[_Shard]":
        """Return the shards of a bucket with ``members``, in the order of the ranks."""
        packs = self._pack_by_size(members, len(work))
        limit = max(pack.end for pack in packs)
        packs.sort(key=lambda pack: pack.cost, reverse=True)
        by_size = list(packs)
        for pack, index in zip(packs, sorted(range(len(work)), key=lambda i: work[i]), strict=True):
            by_size[index] = pack
        by_cost = self._pack_by_cost(members, work, limit)
        if by_cost is None or _most_work(by_size, work) < _most_work(by_cost, work):
            return by_size
        return by_cost

    def _pack_by_size(self, members: list[Tensor], num_shards: int) -> "list[_Shard]":
        """Return shards where each parameter went to the emptiest shard, the largest parameter first."""
        shards = [_Shard() for _ in range(num_shards)]
        for param in sorted(members, key=lambda p: p.numel(), reverse=True):
            min(shards, key=lambda shard: shard.end).add(param, self._costs[param])
        return shards

    def _pack_by_cost(self, members: list[Tensor], work: list[float], limit: int) -> "list[_Shard] | None":
        """Return shards of at most ``limit`` elements, or None if some parameter fits into none of them.

        Each parameter goes to the rank with the least work that it fits on, the most expensive first.
        """
        shards = [_Shard() for _ in work]
        for param in sorted(members, key=lambda p: (self._costs[p], p.numel()), reverse=True):
            fitting = [i for i, shard in enumerate(shards) if shard.end_with(param) <= limit]
            if not fitting:
                return None
            index = min(fitting, key=lambda i: (work[i] + shards[i].cost, shards[i].end))
            shards[index].add(param, self._costs[param])
        return shards


@dataclass
class _Shard:
    """One rank's shard of a bucket: its parameters with their first elements, its length and its cost."""

    places: list[tuple[Tensor, int]] = field(default_factory=list)
    end: int = 0
    cost: float = 0.0

    def end_with(self, param: Tensor) -> int:
        return _rounded(self.end, _ALIGNMENT) + param.numel()

    def add(self, param: Tensor, cost: float) -> None:
        self.places.append((param, _rounded(self.end, _ALIGNMENT)))
        self.end = self.end_with(param)
        self.cost += cost


def _most_work(shards: list[_Shard], work: list[float]) -> float:
    return max(before + shard.cost for before, shard in zip(work, shards, strict=True))


def _buckets(params: Sequence[Tensor], bucket_size: int | None, num_shards: int) -> Iterator[list[Tensor]]:
    """Yield the parameters of each bucket, in the order in which the backward pass takes them."""
    members: list[Tensor] = []
    total = largest = 0
    for param in reversed(params):
        members.append(param)
        total += param.numel()
        largest = max(largest, param.numel())
        if bucket_size is not None and total >= max(bucket_size, _FILL * num_shards * largest):
            yield members
            members, total, largest = [], 0, 0
    if members:
        yield members


def _rounded(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
