"""Optimizer state of layers that share a key in a checkpoint, where only some of them have that state.

Megatron stores the layers' tensors of one kind under one key, as a tensor with an axis for the layers in
front, and one for the experts; that tensor has to be complete. But a frozen layer has no state, and one
that ``--spectral-exclude`` names has AdamW's instead of a momentum. So a key with holes is divided at a
save: ``<key>/<layer>`` or ``<key>/<layer>.<expert>``, by as many axes as leave complete tensors. Other keys
stay what they are. A load takes each key in the form that the checkpoint has.

All this works on Megatron's sharded state dicts, of any optimizer.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sso_megatron.mcore.parameters.names import MASTER, STATE

_STATE_KEY = re.compile(rf"(?:chained_\d+\.)?{re.escape(STATE)}\.(?P<state>[^.]+)\.(?P<weight>.+)")
"""Matches the key of a state tensor: the name of the state, and Megatron's key of the weight."""

_UNUSED = "sso_megatron/unused"
"""Place in a state dict of tensors that are read because their key is complete only with them."""

_SHOWN = 3
"""Number of weights that a line names."""

Offset = tuple[int, ...]


@dataclass
class Stack:
    """A key with axes in front, and the places along them that have a tensor.

    Attributes:
        shape: lengths of the axes.
        dtype: dtype of the tensors.
        offsets: the places.
    """

    shape: Offset
    dtype: torch.dtype
    offsets: set[Offset] = field(default_factory=set)

    @property
    def depth(self) -> int:
        """Number of axes to take off so that complete tensors are left; 0 without holes."""
        for depth in range(len(self.shape)):
            inner = list(itertools.product(*map(range, self.shape[depth:])))
            outer = {offset[:depth] for offset in self.offsets}
            if len(self.offsets) == len(outer) * len(inner):
                return depth
        return len(self.shape)


@dataclass
class Anew:
    """The states that a load does not find in a checkpoint that has their weights.

    Attributes:
        states: names of the states by the name of the weight.
        masters: float32 copies that have to be made of their weights, each with its weight.
    """

    states: dict[str, list[str]] = field(default_factory=dict)
    masters: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def divide_(state_dict: Any) -> None:
    """Divide the keys of optimizer state that have holes, in place, before a save.

    Collectives: one gather of objects over the world.
    """
    stacks, _ = _of_all_ranks(_stacks(state_dict), {})
    depths = {key: stack.depth for key, stack in stacks.items() if stack.depth}
    if depths:
        _map_(state_dict, lambda entry: _divided(entry, depths))


def match_(wanted: Any, stored: Collection[str], may_start_anew: bool = True) -> Anew:
    """Ask for each state by the key that it has in a checkpoint, in place. No collective.

    Where the checkpoint lacks a state, the optimizer keeps its own value, as it was made.

    Args:
        wanted: a sharded state dict to load, with the model's weights.
        stored: the checkpoint's keys.
        may_start_anew: whether states may be missing; otherwise the caller finds that they are.
    """
    depths = {}
    for key in stored:
        base, slash, offset = key.rpartition("/")
        if slash and _STATE_KEY.fullmatch(base):
            depths[base] = offset.count(".") + 1
    weights = {_name(entry): entry for entry in _entries(wanted, of_state=False)}
    found = Anew()

    def match(entry: Any) -> Any:
        if not _is_entry(entry, of_state=True):
            return entry
        matched, name = _divided(entry, depths), _name(entry)
        if all(tensor.key in stored for tensor in _tensors(matched)):
            return matched
        has_weight = name in weights and all(tensor.key in stored for tensor in _tensors(weights[name]))
        if not (may_start_anew and has_weight):  # of another model, or damaged; the caller finds out
            return entry
        state = _STATE_KEY.fullmatch(entry.key)["state"]  # type: ignore[index]
        found.states.setdefault(name, []).append(state)
        if state == MASTER:
            found.masters.append((entry.data, weights[name].data))
        return _kept(entry.data)

    _map_(wanted, match)
    return found


def complete_(wanted: dict[str, Any], found: Anew) -> None:
    """Add what has to be read only because keys are read as a whole, and print what starts anew.

    Layers that this run freezes or excludes may have a state in the checkpoint: it is read and left.

    Collectives: one gather of objects over the world.

    Args:
        wanted: a sharded state dict after ``match_``; changed in place.
        found: the result of ``match_``.
    """
    stacks, states = _of_all_ranks(_stacks(wanted), found.states)
    holes = {key: stack for key, stack in stacks.items() if stack.depth}
    if holes:
        weights = list(_entries(wanted, of_state=False))
        pairs = itertools.product(weights, holes.items())
        wanted[_UNUSED] = [tensor for entry, (key, hole) in pairs for tensor in _fillers(entry, key, hole)]
    if states and dist.get_rank() == 0:
        names = ", ".join(dict.fromkeys(name for kept in states.values() for name in kept))
        some = ", ".join(list(states)[:_SHOWN])
        if len(states) > _SHOWN:
            some += f" and {len(states) - _SHOWN} more"
        print(
            f"sso_megatron: the checkpoint lacks optimizer state ({names}) of {some}; there it starts anew",
            flush=True,
        )


def discard_unused(loaded: dict[str, Any]) -> None:
    """Remove from a loaded state dict what ``complete_`` has added."""
    loaded.pop(_UNUSED, None)


# ---------------------------------------------------------------- entries of a sharded state dict


def _is_entry(entry: Any, of_state: bool) -> bool:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    is_tensor = isinstance(entry, ShardedTensor | ShardedTensorFactory)
    return is_tensor and (_STATE_KEY.fullmatch(entry.key) is not None) == of_state


def _entries(state_dict: Any, of_state: bool) -> Iterator[Any]:
    """Yield the tensors of optimizer state, or all others; a factory stands for those that it builds."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    return (entry for entry in nested_values(state_dict) if _is_entry(entry, of_state))


def _tensors(entry: Any) -> list[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if isinstance(entry, ShardedTensorFactory):
        return list(nested_values({"built": entry.build()}))
    return [entry]


def _map_(state_dict: Any, change: Any) -> Any:
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace

    return dict_list_map_inplace(change, state_dict)


def _kept(value: Any) -> Any:
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    return LocalNonpersistentObject(value)


def _place(tensor: Any) -> Offset:
    return tuple(tensor.global_offset[: tensor.prepend_axis_num])


def _stacks(state_dict: Any) -> dict[str, Stack]:
    """Return this rank's part of every state key with axes in front."""
    found: dict[str, Stack] = {}
    for entry in _entries(state_dict, of_state=True):
        for tensor in _tensors(entry):
            if tensor.prepend_axis_num:
                shape = tuple(tensor.global_shape[: tensor.prepend_axis_num])
                found.setdefault(tensor.key, Stack(shape, tensor.dtype)).offsets.add(_place(tensor))
    return found


def _of_all_ranks(
    stacks: dict[str, Stack], states: dict[str, list[str]]
) -> tuple[dict[str, Stack], dict[str, list[str]]]:
    """Return the stacks and the names of all ranks together.

    Collectives: one gather of objects over the world.
    """
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (stacks, states))
    together: dict[str, Stack] = {}
    names: dict[str, list[str]] = {}
    for stacks, states in parts:
        for key, stack in stacks.items():
            together.setdefault(key, Stack(stack.shape, stack.dtype)).offsets.update(stack.offsets)
        names |= states
    return together, names


def _divided(entry: Any, depths: Mapping[str, int]) -> Any:
    """Return an entry of optimizer state with as many axes in its keys as ``depths`` says."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not _is_entry(entry, of_state=True):
        return entry
    if not isinstance(entry, ShardedTensorFactory):
        return _divided_tensor(entry, depths.get(entry.key, 0))
    build = entry.build_fn

    def divide(tensor: Any) -> Any:
        return _divided_tensor(tensor, depths.get(tensor.key, 0))

    return replace(entry, build_fn=lambda *args, **named: _map_(build(*args, **named), divide))


def _divided_tensor(tensor: Any, depth: int) -> Any:
    if not depth:
        return tensor
    grid = tensor.axis_fragmentations
    return replace(
        tensor,
        key=f"{tensor.key}/{'.'.join(map(str, tensor.global_offset[:depth]))}",
        global_shape=tensor.global_shape[depth:],
        global_offset=tensor.global_offset[depth:],
        axis_fragmentations=grid and grid[depth:],
        prepend_axis_num=tensor.prepend_axis_num - depth,
    )


def _fillers(weight: Any, key: str, stack: Stack) -> Iterator[Any]:
    """Yield tensors of a weight's shape for the places of a key that no rank asks for."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    base, slash, offset = key.rpartition("/")
    base, depth = (base, offset.count(".") + 1) if slash else (key, 0)
    if _STATE_KEY.fullmatch(base)["weight"] != weight.key:  # type: ignore[index]
        return
    changes: dict[str, Any] = {"key": base, "data": torch.empty(weight.data.shape, dtype=stack.dtype)}
    if isinstance(weight, ShardedTensor):
        changes["dtype"] = stack.dtype
    for tensor in _tensors(_divided(replace(weight, **changes), {base: depth})):
        if tensor.key == key and _place(tensor) not in stack.offsets:
            yield tensor


def _name(entry: Any) -> str:
    """Return the name of the weight of an entry, with its numbers of layer and expert."""
    tensor, matched = _tensors(entry)[0], _STATE_KEY.fullmatch(entry.key)
    name = matched["weight"] if matched else entry.key
    for number, stack in zip(_place(tensor), ("layers.", "experts."), strict=False):
        name = name.replace(stack, f"{stack}{number}.", 1)
    return str(name)
