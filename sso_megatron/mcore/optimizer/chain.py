"""The chain of spectral and AdamW optimizers that Megatron trains with, and its state in checkpoints.

Imports Megatron, hence is itself imported when an optimizer is built and not before.

The state has one form, whatever the parallel layout and whether it is sharded over data-parallel ranks:
tensors of a parameter's shape under ``optimizer.state.<what>.<Megatron's key of the parameter>``, with the
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

# Marks our form of the state.
_FORM, _VERSION = "sso_megatron", 1


class SpectralChain(ChainedOptimizer):
    """Spectral and AdamW optimizers of a model.

    Beside its state in checkpoints it differs from its base (Megatron-Core 0.19) in this: a step whose
    gradient norm is not finite is skipped, on all ranks alike, as the norm is that of the whole model.
    The base goes on unless ``--grad-norm-skip-threshold`` is given, and then lets NaN pass. It also counts
    gradients that tensor-parallel ranks hold copies of on one of them alone, and would not see that
    another's copy is spoilt.
    """

    def __init__(self, chained_optimizers: list[Any], model_chunks: Sequence[Any]) -> None:
        """Take Megatron's optimizers, of which a rank may have none, and this rank's part of the model."""
        super().__init__(chained_optimizers)
        self._device = device_of(model_chunks)
        self._grad_norm = 0.0
        for optimizer in leaves(chained_optimizers):
            setattr(optimizer, grads_for_norm(), _with_spoilt_copies(optimizer))

    def get_grad_norm(self) -> float:
        """Norm of the whole model's gradient, the same on every rank; of what ``pre_clip_`` leaves of it.

        Collectives: those of ``SpectralClip.pre_clip_`` and Megatron's.
        """
        for optimizer in leaves(self.chained_optimizers):
            if isinstance(optimizer.optimizer, SpectralClip):
                optimizer.optimizer.pre_clip_()
        self._grad_norm = super().get_grad_norm()
        return self._grad_norm

    def step_with_ready_grads(self) -> bool:
        """Step every part, or none."""
        if not math.isfinite(self._grad_norm):
            if dist.get_rank() == 0:
                norm = float(self._grad_norm)
                print(f"sso_megatron: gradient norm {norm}: this step is skipped", flush=True)
            return False
        return self._step_parts()

    def _synchronize_steps(self) -> Any:
        """As the base's, which compares counters by value."""
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
        """The state for a distributed checkpoint.

        Collectives: to save, those of the parts' ``read`` and one all-reduce over the world; to load, none.

        Args:
            model_sharded_state_dict: Megatron's, of the model's parameters.
            is_loading: make tensors to load into.
        """
        parts = list(state_adapters(self))
        entries = _entries_by_parameter(model_sharded_state_dict)
        states = (s for part in parts for s in (part.targets() if is_loading else part.read()))
        sharded: dict[str, Any] = {
            "state": {str(i): _sharded_tensors(state, entries) for i, state in enumerate(states)},
            "spectral": _spectral_objects(parts, entries, is_loading),
        }
        if is_loading:  # what is not sharded comes from the checkpoint
            return sharded
        return sharded | {_FORM: _VERSION, "step": self._largest_step(parts)}

    def load_state_dict(self, state_dict: Any) -> None:
        """Take over a checkpoint's state.

        Collectives: one all-reduce over the world.

        Args:
            state_dict: ``sharded_state_dict`` with its values loaded, or a list of the parts' own
                (checkpoints in the format ``torch``).
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
        """Steps taken so far; a rank may have no state that counts them."""
        step = torch.tensor(max((step_of(part.inner) for part in parts), default=0), device=self._device)
        dist.all_reduce(step, op=dist.ReduceOp.MAX)
        return int(step)


def _spectral_objects(
    parts: list[StateAdapter], entries: dict[int, Any], is_loading: bool
) -> dict[str, ShardedObject]:
    """One object for each logical matrix that this rank works on."""
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
    """Take over what a checkpoint has of logical matrices; how many it lacks, and how many there are."""
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
    """Ranks that gather cut matrices all hold what is kept of them; owners are alone with theirs."""
    if batch.shards is None or batch.mode == "owner":
        return of_parameter
    return (batch.shards.rank, *(of_parameter if isinstance(of_parameter, tuple) else (of_parameter,)))


def global_matrix_name(member: Member) -> str:
    """Name of a logical matrix, the same however experts are stored."""
    return expert_by_itself(member.name)


def _members(optimizer: SpectralOptimizer) -> Iterator[tuple[MatrixBatch, Member]]:
    for batch in optimizer.batches:
        for member in batch.here:
            yield batch, member


def _with_spoilt_copies(optimizer: Any) -> Callable[..., list[Tensor]]:
    """Gradients of the norm, and a zero for those that it leaves out: NaN if one is spoilt."""
    original = getattr(optimizer, grads_for_norm())

    def get_grads_for_grad_norm(*args: Any, **kwargs: Any) -> list[Tensor]:
        counted = original(*args, **kwargs)
        ids = set(map(id, counted))
        gradients = [p.grad for p in optimizer.get_parameters() if p.grad is not None]
        others = [gradient.float().sum() for gradient in gradients if id(gradient) not in ids]
        return [*counted, 0 * torch.stack(others).sum()] if others else counted

    return get_grads_for_grad_norm


def _entries_by_parameter(model_sharded_state_dict: dict[str, Any]) -> dict[int, Any]:
    """What Megatron says of each parameter's place in the checkpoint, by the parameter's id."""
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
    """``replica_id`` with another data-parallel place: its last number."""
    if data_parallel is None:
        return replica_id
    return (*replica_id[:-1], data_parallel) if isinstance(replica_id, tuple) else data_parallel
