"""All-gathers of updated parameters that start while the spectral optimizer works on others.

This module imports Megatron, so it may only be imported when an optimizer is built.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sso_megatron.mcore.compat.private_api import SHARDED_WHOLE
from sso_megatron.mcore.optimizer.megatron_state import WholeStateAdapter, leaves
from sso_megatron.parallel.shards import copy_all_


@dataclass(eq=False)
class _Bucket:
    """A bucket of Megatron's buffers.

    Attributes:
        params: the model's parameters in the bucket.
        data: their values, flat, with one shard for each rank of ``dp_group``.
        dp_group: group over which the bucket is gathered.
    """

    params: list[Tensor]
    data: Tensor
    dp_group: dist.ProcessGroup


class ParamGather:
    """Gathers each bucket once this rank has written its shard of it and of the buckets before it.

    Ranks own different matrices and finish buckets in different orders, but all start gathers in the same
    order, that of ``_in_order``, over all data-parallel groups. A rank without a matrix in a bucket counts
    as having written it.

    There is no deadlock: a gather that was started blocks no rank before ``finish``, and there all ranks
    have started all gathers. Until then ranks wait only for the spectral step's own collectives, whose
    order over each tensor-parallel group is the same as without gathers. The order of gathers relative to
    the collectives of a tensor-parallel group differs from rank to rank. So on a GPU the kernels of a
    gather and of an exchange must be able to run side by side, as Megatron's own overlap requires, and NCCL
    must have made its connections, for which a host may wait for kernels: in the first step of a run,
    gather without this class. It has not been measured on a GPU yet.
    """

    def __init__(self, optimizers: Iterable[Any], model_chunks: list[Any]) -> None:
        """Find the buckets of a model and the parameters of its spectral optimizers.

        Args:
            optimizers: Megatron's wrappers of spectral optimizers, each with this rank's whole matrices;
                there may be none.
            model_chunks: model chunks wrapped in Megatron's DDP, with buffers that are sharded.
        """
        parts = [WholeStateAdapter(optimizer, is_sharded=True) for optimizer in leaves(optimizers)]
        self._inner: list[Any] = [part.inner for part in parts]
        self._model_params = {held: param for part in parts for param, held in part.parameters()}
        self._buckets = _in_order(model_chunks)
        self._bucket_of = {param: bucket for bucket in self._buckets for param in bucket.params}
        # The state of the step that is running.
        self._unwritten: Counter[_Bucket] = Counter()
        self._waiting: deque[_Bucket] = deque()
        self._handles: list[dist.Work] = []

    def step(self) -> None:
        """Step the spectral optimizers, write their model parameters, and start to gather all parameters.

        The parameters of other optimizers must be written already.

        Collectives: those of the optimizers; one all-gather of each bucket, started and not waited for.
        """
        self._unwritten = Counter(self._bucket_of[param] for param in self._model_params.values())
        self._waiting, self._handles = deque(self._buckets), []
        self._start_finished()
        for inner in self._inner:
            inner.on_written = self._take
            try:
                inner.step()
            finally:
                inner.on_written = None

    def finish(self) -> None:
        """Wait until all gathers are finished and every rank has all parameters."""
        self._unwritten.clear()
        self._start_finished()
        for handle in self._handles:
            handle.wait()
        self._handles = []

    def _take(self, written: list[Tensor]) -> None:
        """Write model parameters that the step has finished, and start gathers that may start now.

        Args:
            written: the optimizer's own parameters; in bf16 they are float32 masters.
        """
        masters = [held for held in written if self._model_params[held] is not held]
        copy_all_([self._model_params[held].detach() for held in masters], masters)
        self._unwritten.subtract(self._bucket_of[self._model_params[held]] for held in written)
        self._start_finished()

    def _start_finished(self) -> None:
        while self._waiting and not self._unwritten[self._waiting[0]]:
            bucket = self._waiting.popleft()
            shard = bucket.data.chunk(bucket.dp_group.size())[bucket.dp_group.rank()]
            handle = dist.all_gather_into_tensor(bucket.data, shard, group=bucket.dp_group, async_op=True)
            assert handle is not None  # this rank is in the group
            self._handles.append(handle)


def _in_order(model_chunks: list[Any]) -> list[_Bucket]:
    """Return all buckets, about as steps finish them: AdamW's, dense matrices', experts', by layer."""
    found: list[tuple[tuple[bool, bool], _Bucket]] = []
    for chunk in model_chunks:
        for groups in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
            is_expert = groups is chunk.expert_parallel_bucket_groups
            for group in reversed(groups):  # they are in the order of the backward pass
                for bucket in reversed(group.buckets):
                    params = bucket.params_list
                    kind = getattr(params[0], SHARDED_WHOLE), is_expert
                    dp_group = group.intra_distributed_optimizer_instance_group
                    found.append((kind, _Bucket(params, bucket.param_data, dp_group)))
    return [bucket for _, bucket in sorted(found, key=itemgetter(0))]
