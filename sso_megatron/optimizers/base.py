"""The engine every spectral optimizer runs on: parameters in, batches of whole matrices out."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.matrices.layout import ParameterLayout, Split, whole
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.parallel.gather import gather_shards, take_shard
from sso_megatron.updates.momentum import direction, update_momentum_

FindLayout = Callable[[Tensor], ParameterLayout]

# Tensors of a matrix's size that a step holds at once: weight, momentum direction, its normalised
# form, the shifted matrix, two iterates, the accepted update, and the products' temporaries.
_WORKSPACE_COPIES = 12


@dataclass(frozen=True)
class Member:
    """One logical matrix of a batch."""

    param: Tensor
    layout: ParameterLayout
    split: Split

    @property
    def name(self) -> str:
        """Global name of the logical matrix."""
        return self.layout.matrix_name(self.split)


@dataclass
class MatrixBatch:
    """Logical matrices of one shape, placement and parameter group, worked on in one go.

    Attributes:
        members: in parameter order, so that every rank of ``tp_group`` has the same order.
        group: their parameter group.
        cache: what the algorithm keeps for this batch from step to step; None before the first.
        stats: what the last step reported, one entry a member; None before the first.
    """

    members: list[Member]
    group: dict[str, Any]
    cache: Any = None
    stats: Any = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Global ``(d_out, d_in)``."""
        return self.members[0].split.shape

    @property
    def dtype(self) -> torch.dtype:
        """What is worked in: float32, or float64 for float64 parameters."""
        return torch.promote_types(self.members[0].param.dtype, torch.float32)

    def gather(self, parts: Iterable[Tensor]) -> Tensor:
        """Whole float32 (or float64) matrices from this rank's part of each.

        Collectives: one all-gather over the members' group where they are cut, else none.

        Args:
            parts: this rank's part of each member's matrix; several rounds of members may follow each
                other, which then share the one collective.

        Returns:
            ``(k, d_out, d_in)``, ``k`` the number of parts.
        """
        local = torch.stack([part.to(self.dtype) for part in parts])
        first = self.members[0]
        if first.split.partition_dim is None:
            return local
        return gather_shards(local, first.split.partition_dim, first.layout.tp_group)

    def gather_weights(self) -> Tensor:
        """Copies of the whole weights, ``(b, d_out, d_in)``. Collectives: see ``gather``."""
        return self.gather(member.split.read(member.param.detach()) for member in self.members)

    def scatter_(self, values: Tensor) -> None:
        """Write whole matrices ``(b, d_out, d_in)`` back into the parameters. No collective.

        A parameter without a gradient is left as it is, as every torch optimizer does.
        """
        first = self.members[0]
        if first.split.partition_dim is not None:
            values = take_shard(values, first.split.partition_dim, first.layout.tp_group)
        for member, value in zip(self.members, values, strict=True):
            if member.param.grad is not None:
                member.split.write_(member.param.detach(), value)


class SpectralOptimizer(torch.optim.Optimizer):
    """Momentum, batching and gathering; a subclass takes the step on a batch of whole matrices.

    Collectives of ``step``: one all-gather (weight and momentum direction together) for each batch
    of equal matrices that tensor parallelism cuts; the number of batches grows only when a batch
    exceeds the workspace. The ranks of a group must agree on which parameters have gradients.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        shared: SpectralConfig,
        find_layout: FindLayout | None,
    ) -> None:
        """See the subclass; ``find_layout=None`` takes every parameter as one whole matrix."""
        self.shared = shared
        self._momentum, self._nesterov, self._weight_decay = momentum, nesterov, weight_decay
        self._find_layout = find_layout
        self._batches: list[MatrixBatch] | None = None
        # Nothing but the learning rate is in the groups: a checkpoint restores groups, and what the
        # optimizer was built with must win over what an earlier run was built with.
        super().__init__(params, {"lr": lr})

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def init_state(self) -> None:
        """Make the momentum of every parameter, so that a checkpoint can be loaded into it."""
        for param in self._parameters():
            if "momentum_buffer" not in self.state[param]:
                dtype = torch.promote_types(param.dtype, torch.float32)
                self.state[param]["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load momenta and groups; spectral caches are found again from the loaded weights."""
        super().load_state_dict(state_dict)
        # torch rounds floating state to the parameter's dtype: take float32 momenta from the source.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, param in zip(saved, self._parameters(), strict=True):
            if "momentum_buffer" in self.state[param]:
                source = state_dict["state"][index]["momentum_buffer"]
                dtype = torch.promote_types(param.dtype, torch.float32)
                self.state[param]["momentum_buffer"] = source.to(param.device, dtype, copy=True)
        self.reset_caches()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; batches are made anew.

        Raises:
            ValueError: a parameter that is no matrix, or a setting outside its rule.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self.reset_caches()

    def reset_caches(self) -> None:
        """Forget what is known of the weights' spectra; call it after editing weights by hand."""
        self._batches = None

    def __getstate__(self) -> dict[str, Any]:
        """All attributes for copy and pickle, but for batches, which hold this object's parameters."""
        return self.__dict__ | {"_batches": None}

    @property
    def batches(self) -> list[MatrixBatch]:
        """Batches of logical matrices, in the order in which a step takes them."""
        # Made late: Megatron puts fp32 master weights into the groups after construction.
        if self._batches is None:
            self._batches = self._make_batches()
        return self._batches

    def _make_batches(self) -> list[MatrixBatch]:
        by_key: dict[tuple[Any, ...], MatrixBatch] = {}
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"param_groups[{index}].params[{i}]" for i in range(len(group["params"]))
            ]
            for position, param in enumerate(group["params"]):
                if self._find_layout is None:
                    layout = ParameterLayout(names[position], (whole(param.shape),))
                else:
                    layout = self._find_layout(param)
                for split in layout.splits:
                    cut = None if split.partition_dim is None else id(layout.tp_group)
                    key = (index, split.shape, split.partition_dim, cut, param.dtype, param.device)
                    batch = by_key.setdefault(key, MatrixBatch([], group))
                    batch.members.append(Member(param, layout, split))
        return [part for batch in by_key.values() for part in self._within_workspace(batch)]

    def _within_workspace(self, batch: MatrixBatch) -> Iterator[MatrixBatch]:
        d_out, d_in = batch.shape
        matrix_bytes = _WORKSPACE_COPIES * d_out * d_in * batch.dtype.itemsize
        size = max(1, (self.shared.workspace_mib << 20) // matrix_bytes)
        for start in range(0, len(batch.members), size):
            yield MatrixBatch(batch.members[start : start + size], batch.group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step; see the class for the collectives.

        Args:
            closure: evaluates the model again and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.init_state()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError(
                        "a spectral step needs dense gradients; give a parameter with sparse "
                        "gradients to torch.optim.SparseAdam"
                    )
                buffer = self.state[param]["momentum_buffer"]
                update_momentum_(buffer, param.grad, self._momentum)
        for batch in self.batches:
            if any(member.param.grad is not None for member in batch.members):
                self._step_batch(batch)
        return loss

    def _step_batch(self, batch: MatrixBatch) -> None:
        weights = [member.split.read(member.param.detach()) for member in batch.members]
        directions = [self._direction(member) for member in batch.members]
        W, N = batch.gather(weights + directions).chunk(2)
        if self._weight_decay:
            W.mul_(1 - batch.group["lr"] * self._weight_decay)
        self.update_batch_(batch, W, N)
        batch.scatter_(W)

    def _direction(self, member: Member) -> Tensor:
        buffer = member.split.read(self.state[member.param]["momentum_buffer"])
        if member.param.grad is None:
            return torch.zeros_like(buffer)
        gradient = member.split.read(member.param.grad)
        return direction(buffer, gradient, self._momentum, self._nesterov)

    def update_batch_(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        """Take the algorithm's step in place.

        Args:
            batch: gives the group's settings and holds the algorithm's cache and statistics.
            W: ``(b, d_out, d_in)`` whole weights, float32 or float64.
            N: ``(b, d_out, d_in)`` momentum direction, same dtype.
        """
        raise NotImplementedError


def _check_group(group: dict[str, Any]) -> None:
    for param in group["params"]:
        if param.ndim != 2 or param.numel() == 0:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is no matrix; give parameters that are "
                "not 2-D, and embeddings and the output layer, to torch.optim.AdamW"
            )
    if not 0 <= group["lr"] < math.inf:
        raise ValueError(f"lr={group['lr']!r} must not be negative; the paper's range is 1e-3 to 3e-2")
    unread = {"momentum", "nesterov", "weight_decay"} & group.keys()
    if unread:
        names = ", ".join(sorted(unread))
        raise ValueError(f"{names} in a parameter group is not read; make an optimizer of its own for it")
