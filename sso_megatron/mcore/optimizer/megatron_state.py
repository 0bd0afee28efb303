"""The state that Megatron's optimizer classes keep for each parameter, in the parameter's own shape.

This module imports Megatron, so it may only be imported when an optimizer is built.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

from sso_megatron.mcore.compat.private_api import adamw_state_keys
from sso_megatron.mcore.parameters.names import MASTER
from sso_megatron.optimizers.base import SpectralOptimizer


@dataclass
class ParameterState:
    """The optimizer state of one parameter.

    Attributes:
        param: the model's parameter.
        tensors: tensors of its shape, by name: ``exp_avg``, ``momentum_buffer``, ``fp32_param``.
        replica: place of this rank among the data-parallel ranks that have this state, 0 for the rank that
            writes it; None where all of them have it.
    """

    param: Tensor
    tensors: dict[str, Tensor]
    replica: int | None = None


class StateAdapter(Protocol):
    """Reads and writes the state of one optimizer of a chain.

    Attributes:
        inner: the torch optimizer.
    """

    inner: torch.optim.Optimizer

    def read(self) -> Iterator[ParameterState]:
        """Yield the state that this rank writes to a checkpoint, or holds a copy of."""

    def targets(self) -> Iterator[ParameterState]:
        """Yield tensors for the state that this rank loads, always in the same order. No collective."""

    def write_(self, states: Iterator[ParameterState]) -> None:
        """Write loaded states into the optimizer; they are in the order of ``targets``. No collective."""


def leaves(optimizers: Iterable[Any]) -> Iterator[Any]:
    """Yield the optimizers inside chains of them; one of an entirely frozen model is left out."""
    for optimizer in optimizers:
        if isinstance(optimizer, ChainedOptimizer):
            yield from leaves(optimizer.chained_optimizers)
        elif optimizer.optimizer is not None:
            yield optimizer


def state_adapters(chain: ChainedOptimizer) -> Iterator[StateAdapter]:
    """Yield an adapter for each optimizer of a chain, after making its state; all ranks have one order."""
    for member in chain.chained_optimizers:
        is_sharded = isinstance(member, LayerWiseDistributedOptimizer)
        for optimizer in leaves([member]):
            _init_state(optimizer)
            is_cut = isinstance(optimizer, DistributedOptimizer)
            yield ShardedStateAdapter(optimizer) if is_cut else WholeStateAdapter(optimizer, is_sharded)


def _init_state(optimizer: Any) -> None:
    """Make an optimizer's state as its first step would."""
    inner = optimizer.optimizer
    optimizer.init_state_fn(inner, optimizer.config)
    if _counts_by_parameter(inner):
        # Megatron's function leaves the counter out; torch then takes the state for complete and fails.
        for state in inner.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _counts_by_parameter(inner: torch.optim.Optimizer) -> bool:
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def step_of(inner: torch.optim.Optimizer) -> int:
    """Return the steps that an optimizer has taken, for bias corrections; 0 if it does not count."""
    by_parameter = next((state["step"] for state in inner.state.values() if "step" in state), 0)
    # FusedAdam and our optimizers that count do so by group; FusedAdam does not count in an empty one.
    return max(int(by_parameter), *(int(group.get("step", 0)) for group in inner.param_groups), 0)


def set_step(inner: torch.optim.Optimizer, step: int) -> None:
    """Set the optimizer's step counters to ``step``."""
    if isinstance(inner, SpectralOptimizer) and not inner.counts_steps:
        return
    if not _counts_by_parameter(inner):  # FusedAdam of TransformerEngine or apex
        for group in inner.param_groups:
            group["step"] = step
    for state in inner.state.values():
        if "step" in state:
            # Each parameter needs its own tensor, since torch counts in place.
            state["step"] = torch.full_like(state["step"], step)


class WholeStateAdapter:
    """Adapts an optimizer of whole parameters: Megatron's in float32 or with float32 masters.

    Attributes:
        inner: the torch optimizer.
        is_sharded: whether data-parallel ranks hold different parameters instead of copies of the same.
    """

    def __init__(self, optimizer: Any, is_sharded: bool) -> None:
        """Adapt the torch optimizer inside Megatron's wrapper."""
        self.inner, self._wrapper, self.is_sharded = optimizer.optimizer, optimizer, is_sharded

    def parameters(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the model's parameters, each with what the inner optimizer has: itself or its master."""
        if isinstance(self._wrapper, Float16OptimizerWithFloat16Params):
            models, masters = self._wrapper.float16_groups, self._wrapper.fp32_from_float16_groups
            yield from zip(itertools.chain(*models), itertools.chain(*masters), strict=True)
            for param in itertools.chain(*self._wrapper.fp32_from_fp32_groups):
                yield param, param
        else:
            for group in self.inner.param_groups:
                for param in group["params"]:
                    yield param, param

    def read(self) -> Iterator[ParameterState]:
        """Yield the state tensors themselves, not copies of them. No collective."""
        for param, held in self.parameters():
            tensors = {
                name: value
                for name, value in self.inner.state[held].items()
                if isinstance(value, Tensor) and value.shape == held.shape
            }
            if held is not param:
                tensors[MASTER] = held.detach()
            yield ParameterState(param, tensors, 0 if self.is_sharded else None)

    targets = read  # a checkpoint is read right into the state

    def write_(self, states: Iterator[ParameterState]) -> None:
        """Copy loaded states into the optimizer's state and masters. No collective."""
        for state, (_, held) in zip(states, self.parameters(), strict=True):
            for name, value in state.tensors.items():
                target = held.detach() if name == MASTER else self.inner.state[held][name]
                target.copy_(value)


class ShardedStateAdapter:
    """Adapts Megatron's ``DistributedOptimizer``, of which a data-parallel rank has a range of each bucket.

    The checkpoint formats of that class (0.19) either fix the layout or fail on torch's AdamW: they expect
    a state before it is made, copy into leaves that require gradients, and share one counter between all
    parameters, which then increases by their number at each step.

    Attributes:
        inner: the torch optimizer.
    """

    def __init__(self, optimizer: DistributedOptimizer) -> None:
        """Adapt Megatron's optimizer."""
        self.inner, self._wrapper = optimizer.optimizer, optimizer
        self._dp_group = optimizer.data_parallel_group

    def _buckets(self) -> Iterator[tuple[Any, Any, dict[Tensor, Any], list[str]]]:
        """Yield each buffer and bucket, this rank's ranges of its parameters, and their state names."""
        for buffer, ranges in zip(self._wrapper.buffers, self._wrapper.gbuf_ranges, strict=True):
            names = adamw_state_keys(self._wrapper)
            if buffer.param_dtype != torch.float32:
                names.append(MASTER)
            (by_bucket,) = ranges.values()
            for bucket, own in zip(buffer.buckets, by_bucket, strict=True):
                yield buffer, bucket, own["param_map"], names

    def _shard(self, param: Tensor, name: str) -> Tensor:
        """Return this rank's range of one state tensor of a parameter, flat."""
        group, place = self._wrapper.model_param_group_index_map[param]
        held = self.inner.param_groups[group]["params"][place]
        return held.detach() if name == MASTER else self.inner.state[held][name]

    def read(self) -> Iterator[ParameterState]:
        """Yield the whole state of the parameters in this rank's buckets, on the host.

        Buckets go to data-parallel ranks in turn, so that no rank holds or writes everything.

        Collectives: one gather for each bucket and state tensor over the data-parallel group.
        """
        size, rank = dist.get_world_size(self._dp_group), dist.get_rank(self._dp_group)
        for index, (buffer, bucket, own, names) in enumerate(self._buckets()):
            home, whole = index % size, {}
            for name in names:
                shard = bucket.grad_data.new_zeros(bucket.grad_data.numel() // size, dtype=torch.float32)
                for param, ranges in own.items():
                    local = ranges["gbuf_local"]
                    shard[local.start : local.end] = self._shard(param, name)
                received = [torch.empty_like(shard) for _ in range(size)] if rank == home else None
                destination = dist.get_global_rank(self._dp_group, home)
                dist.gather(shard, received, dst=destination, group=self._dp_group)
                if received is not None:
                    whole[name] = torch.cat(received).cpu()
            if rank == home:
                for param in bucket.params_list:
                    start, end, _ = buffer.param_index_map[param]
                    place = slice(start - bucket.offset, end - bucket.offset)
                    tensors = {name: flat[place].view(param.shape) for name, flat in whole.items()}
                    yield ParameterState(param, tensors, 0)

    def targets(self) -> Iterator[ParameterState]:
        """Yield host tensors of zeros for the parameters of which this rank has a range. No collective."""
        for _, _, own, names in self._buckets():
            for param, ranges in own.items():
                # Zeros, as at a start: what a checkpoint lacks stays as it is.
                tensors = {name: torch.zeros(param.shape, dtype=torch.float32) for name in names}
                # Exactly one rank has the start of a parameter; it counts as the main replica.
                replica = 0 if ranges["param"].start == 0 else 1 + dist.get_rank(self._dp_group)
                yield ParameterState(param, tensors, replica)

    def write_(self, states: Iterator[ParameterState]) -> None:
        """Copy this rank's ranges of loaded states into the optimizer's state. No collective."""
        owned = (item for _, _, own, _ in self._buckets() for item in own.items())
        for state, (param, ranges) in zip(states, owned, strict=True):
            place = slice(ranges["param"].start, ranges["param"].end)
            for name, value in state.tensors.items():
                self._shard(param, name).copy_(value.flatten()[place])
