"""The chain of spectral and AdamW optimizers that Megatron trains with, and its state in checkpoints.

This module imports Megatron, so it may only be imported when an optimizer is built.

The state has one form, whatever the parallel layout and whether it is sharded over data-parallel ranks:
tensors of a parameter's shape under ``optimizer.state.<name>.<Megatron's key of the parameter>``, with the
parameter's own sharding, and one small object for each logical matrix under
``optimizer.spectral.<its name>``. So a checkpoint of one layout loads in any other.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from sso_megatron.mcore.compat.private_api import grads_for_norm
from sso_megatron.mcore.optimizer.megatron_state import (
    ParameterState,
    StateAdapter,
    WholeStateAdapter,
    leaves,
    set_step,
    state_adapters,
    step_of,
)
from sso_megatron.mcore.parameters.devices import device_of
from sso_megatron.mcore.parameters.names import OPTIONAL_STATE, STATE, expert_by_itself
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.batches import MatrixBatch, Member
from sso_megatron.optimizers.spectral_clip import SpectralClip

Replica = int | tuple[int, ...]

# The key that marks our form of the state, and the version of that form.
_FORM, _VERSION = "sso_megatron", 1


class SpectralChain(ChainedOptimizer):
    """Chains the spectral and AdamW optimizers of a model.

    Apart from its state in checkpoints it differs from its base (Megatron-Core 0.19) in this: a step whose
    gradient norm is not finite is skipped, on all ranks alike, since the norm is that of the whole model.
    The base goes on unless ``--grad-norm-skip-threshold`` is given, and then lets NaN pass. Where
    tensor-parallel ranks hold copies of a gradient, the base also counts only one rank's copy, and would
    not see that another rank's copy is not finite.
    """

    def __init__(self, chained_optimizers: list[Any], model_chunks: Sequence[Any]) -> None:
        """Chain Megatron's optimizers, of which a rank may have none, for this rank's model chunks."""
        super().__init__(chained_optimizers)
        self._device = device_of(model_chunks)
        self._grad_norm = 0.0
        for optimizer in leaves(chained_optimizers):
            setattr(optimizer, grads_for_norm(), _with_spoilt_copies(optimizer))

    def get_grad_norm(self) -> float:
        """Return the norm of the whole model's gradient after ``pre_clip_``, the same on every rank.

        Collectives: those of ``SpectralClip.pre_clip_`` and of Megatron's gradient norm.
        """
        for optimizer in leaves(self.chained_optimizers):
            if isinstance(optimizer.optimizer, SpectralClip):
                optimizer.optimizer.pre_clip_()
        self._grad_norm = super().get_grad_norm()
        return self._grad_norm

    def step_with_ready_grads(self) -> bool:
        """Step every optimizer of the chain, or none where the gradient norm is not finite."""
        if not math.isfinite(self._grad_norm):
            if dist.get_rank() == 0:
                norm = float(self._grad_norm)
                print(f"sso_megatron: gradient norm {norm}: this step is skipped", flush=True)
            return False
        return self._step_parts()

    def _synchronize_steps(self) -> Any:
        """Synchronize step counters as the base does; it can compare integers, but not tensors."""
        for optimizer in leaves(self.chained_optimizers):
            for group in optimizer.optimizer.param_groups:
                if isinstance(group.get("step"), Tensor):
                    group["step"] = int(group["step"])
        return super()._synchronize_steps()

    def _step_parts(self) -> bool:
        return bool(super().step_with_ready_grads())

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **_: Any
    ) -> dict[str, Any]:
        """Return the state for a distributed checkpoint.

        Collectives: to save, those of each ``StateAdapter.read`` and one all-reduce over the world; to
        load, none.

        Args:
            model_sharded_state_dict: Megatron's sharded state dict of the model's parameters.
            is_loading: whether to return tensors to load into.
        """
        parts = list(state_adapters(self))
        entries = _entries_by_parameter(model_sharded_state_dict)
        states = (s for part in parts for s in (part.targets() if is_loading else part.read()))
        sharded: dict[str, Any] = {
            "state": {str(i): _sharded_tensors(state, entries) for i, state in enumerate(states)},
            "spectral": _spectral_objects(parts, entries, is_loading),
        }
        if is_loading:  # entries that are not sharded come from the checkpoint
            return sharded
        return sharded | {_FORM: _VERSION, "step": self._largest_step(parts)}

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a checkpoint's state.

        Collectives: one all-reduce over the world.

        Args:
            state_dict: the result of ``sharded_state_dict`` with its values loaded, or a list of the
                chained optimizers' own state dicts (checkpoints in the format ``torch``).

        Raises:
            ValueError: the state has a form of another version.
        """
        if _FORM not in state_dict:
            super().load_state_dict(state_dict)
            return
        if state_dict[_FORM] != _VERSION:
            raise ValueError(
                f"the optimizer's state has form {state_dict[_FORM]}, and this version reads {_VERSION}; "
                "load it with the version that saved it, or start the optimizer anew with --no-load-optim"
            )
        index, parts = itertools.count(), list(state_adapters(self))
        for part in parts:
            part.write_(
                replace(state, tensors=state_dict["state"][str(next(index))]) for state in part.targets()
            )
            set_step(part.inner, state_dict["step"])
        num_missing, num_matrices = _load_spectral(parts, state_dict.get("spectral", {}))
        counts = torch.tensor([num_missing, num_matrices], device=self._device)
        dist.all_reduce(counts)
        num_missing, num_matrices = counts.tolist()
        if num_missing and dist.get_rank() == 0:
            print(
                f"sso_megatron: for {num_missing / num_matrices:.0%} of the matrices the checkpoint has no "
                "singular vectors; they are found again",
                flush=True,
            )

    def _largest_step(self, parts: list[StateAdapter]) -> int:
        """Return the steps taken so far, the largest count of all ranks, since a rank may count none."""
        step = torch.tensor(max((step_of(part.inner) for part in parts), default=0), device=self._device)
        dist.all_reduce(step, op=dist.ReduceOp.MAX)
        return int(step)


def _spectral_objects(
    parts: list[StateAdapter], entries: dict[int, Any], is_loading: bool
) -> dict[str, ShardedObject]:
    """Return one object for each logical matrix that this rank works on, by its global name."""
    objects = {}
    for part, optimizer in _spectral(parts):
        kept = {} if is_loading else optimizer.spectral_state()
        replicas = {
            id(held): _among_replicas(entries[id(param)].replica_id, 0 if part.is_sharded else None)
            for param, held in part.parameters()
        }
        for batch, member in _members(optimizer):
            if is_loading or member.name in kept:
                name = global_matrix_name(member)
                objects[name] = ShardedObject(
                    OPTIONAL_STATE + name,
                    kept.get(member.name),
                    global_shape=(1,),
                    global_offset=(0,),
                    replica_id=_matrix_replica(batch, replicas[id(member.param)]),
                )
    return objects


def _load_spectral(parts: list[StateAdapter], loaded: dict[str, Any]) -> tuple[int, int]:
    """Load a checkpoint's state of logical matrices.

    Returns:
        The number of this rank's matrices that have no state that fits, and the number of all of them.
    """
    num_missing = num_matrices = 0
    for _, optimizer in _spectral(parts):
        states = {}
        for batch, member in _members(optimizer):
            state = loaded.get(global_matrix_name(member))
            num_matrices += 1
            num_missing += not optimizer.fits(batch, state or {})
            if state is not None:
                states[member.name] = state
        optimizer.load_spectral_state(states)
    return num_missing, num_matrices


def _spectral(parts: list[StateAdapter]) -> Iterator[tuple[WholeStateAdapter, SpectralOptimizer]]:
    for part in parts:
        if isinstance(part, WholeStateAdapter) and isinstance(part.inner, SpectralOptimizer):
            yield part, part.inner


def _matrix_replica(batch: MatrixBatch, of_parameter: Replica) -> Replica:
    """Return the replica id of a matrix's state.

    Ranks that gather a sharded matrix all hold its state, and an owner alone holds that of its matrices.
    """
    if batch.shards is None or batch.mode == "owner":
        return of_parameter
    return (batch.shards.rank, *(of_parameter if isinstance(of_parameter, tuple) else (of_parameter,)))


def global_matrix_name(member: Member) -> str:
    """Return the name of a logical matrix, which is the same however experts are stored."""
    return expert_by_itself(member.name)


def _members(optimizer: SpectralOptimizer) -> Iterator[tuple[MatrixBatch, Member]]:
    for batch in optimizer.batches:
        for member in batch.here:
            yield batch, member


def _with_spoilt_copies(optimizer: Any) -> Callable[..., list[Tensor]]:
    """Return a method that adds one number to the gradients of the norm.

    It is NaN if a gradient that the norm leaves out is not finite, and else zero.
    """
    original = getattr(optimizer, grads_for_norm())

    def get_grads_for_grad_norm(*args: Any, **kwargs: Any) -> list[Tensor]:
        counted = original(*args, **kwargs)
        ids = set(map(id, counted))
        gradients = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
        others = [gradient.float().sum() for gradient in gradients if id(gradient) not in ids]
        return [*counted, 0 * torch.stack(others).sum()] if others else counted

    return get_grads_for_grad_norm


def _entries_by_parameter(model_sharded_state_dict: dict[str, Any]) -> dict[int, Any]:
    """Return Megatron's entry for each parameter in the checkpoint, by the parameter's ``id``."""
    entries: dict[int, Any] = {}
    for entry in nested_values(extract_sharded_tensors_and_factories(model_sharded_state_dict)[0]):
        entries.setdefault(id(entry.data), entry)
    return entries


def _sharded_tensors(state: ParameterState, entries: dict[int, Any]) -> dict[str, Any]:
    entry = entries[id(state.param)]
    sharded = {}
    for name, tensor in state.tensors.items():
        changes: dict[str, Any] = {
            "key": f"{STATE}.{name}.{entry.key}",
            "data": tensor,
            "replica_id": _among_replicas(entry.replica_id, state.replica),
        }
        if isinstance(entry, ShardedTensor):
            changes["dtype"] = tensor.dtype
        sharded[name] = replace(entry, **changes)
    return sharded


def _among_replicas(replica_id: Replica, data_parallel: int | None) -> Replica:
    """Return ``replica_id`` with ``data_parallel`` as its last number; unchanged if that is None."""
    if data_parallel is None:
        return replica_id
    return (*replica_id[:-1], data_parallel) if isinstance(replica_id, tuple) else data_parallel
