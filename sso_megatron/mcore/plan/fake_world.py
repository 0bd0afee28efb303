"""Lets one process take any rank's place in a run, with groups without partners, tensors without memory.

Megatron's own functions build the model and the optimizer that the rank would have, on torch's meta
device and over torch's fake process groups.
"""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from sso_megatron.mcore.compat import private_api

_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}


class OnMeta(TorchFunctionMode):
    """Makes tensors on the meta device, whatever device is asked for, except tensors of given values."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if func in _FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def as_rank(
    args: Namespace, rank: int, get_embedding_ranks: Callable[[list[int]], list[int]]
) -> Iterator[Any]:
    """Run a block as one rank of the run that ``args`` describe; no process group remains afterwards.

    Collectives move nothing. A gather of objects returns this rank's object for every rank.

    Args:
        args: Megatron's validated arguments; ``rank``, ``fake_process_group`` and
            ``use_gloo_process_groups`` are changed.
        rank: the rank, below ``args.world_size``.
        get_embedding_ranks: the script's function that returns a pipeline's ranks with word embeddings.

    Yields:
        Megatron's process groups.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    args.rank, args.fake_process_group = rank, True
    args.use_gloo_process_groups = False  # Gloo groups cannot be fake
    initialize = private_api.existing("megatron.training.initialize:_initialize_distributed")
    initialize(get_embedding_ranks, None, None)
    gather = dist.all_gather_object
    dist.all_gather_object = _all_say_the_same  # type: ignore[assignment]
    try:
        model_parallel_cuda_manual_seed(args.seed)
        with OnMeta():
            yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        dist.all_gather_object = gather
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _all_say_the_same(gathered: list[Any], value: Any, group: Any = None) -> None:
    gathered[:] = [value] * len(gathered)


class Place(NamedTuple):
    """Holds a rank's place in each of its groups.

    Attributes:
        stage: pipeline stage.
        tensor: place in the tensor-parallel group.
        data: place in the data-parallel group, context parallelism included.
        expert_tensor: place in the tensor-parallel group of the experts.
        expert_data: place in the data-parallel group of the experts.
        expert: place in the expert-parallel group.
    """

    stage: int
    tensor: int
    data: int
    expert_tensor: int
    expert_data: int
    expert: int


def places(args: Namespace) -> list[Place]:
    """Return every rank's place, in the order of the ranks, by Megatron's own order of groups."""
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp" if not args.use_tp_pp_dp_mapping else "tp-cp-ep-pp-dp"
    stages, cp = args.pipeline_model_parallel_size, args.context_parallel_size
    dense = args.tensor_model_parallel_size, 1
    experts = (
        args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        args.expert_model_parallel_size,
    )

    def found(token: str, sizes: tuple[int, int], cp: int) -> list[int]:
        tp, ep = sizes
        replicas = args.world_size // (tp * ep * cp * stages)
        generator = RankGenerator(tp=tp, ep=ep, dp=replicas, pp=stages, cp=cp, order=order)
        place = dict.fromkeys(range(args.world_size), 0)
        for group in generator.get_ranks(token):
            place |= {rank: i for i, rank in enumerate(group)}
        return list(place.values())

    columns = (
        found("pp", dense, cp),
        found("tp", dense, cp),
        found("dp-cp", dense, cp),
        found("tp", experts, 1),
        found("dp", experts, 1),
        found("ep", experts, 1),
    )
    return [Place(*column) for column in zip(*columns, strict=True)]
