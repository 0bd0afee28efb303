"""The engine every spectral optimizer runs on: parameters in, batches of matrices out."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.matrices.layout import ParameterLayout, whole
from sso_megatron.optimizers.batches import MatrixBatch, make_batches
from sso_megatron.optimizers.config import SpectralConfig
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.updates.momentum import direction, update_momentum_

FindLayout = Callable[[Tensor], ParameterLayout]

MatrixState = dict[str, Tensor]
"""What an algorithm keeps of one logical matrix from step to step, by name."""


class SpectralOptimizer(torch.optim.Optimizer):
    """Momentum, batching and placement; a subclass takes the step on a batch of matrices.

    Collectives of ``step``: those of each batch's placement (``parallel.placement``); their number
    grows with the number of different shapes, and with the number of matrices only where a batch
    exceeds the workspace. They are issued whether or not parameters have gradients. The ranks of a
    group must agree on which parameters have one.
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
        self._loaded: dict[str, MatrixState] = {}
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

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with ``spectral_state`` under ``spectral``."""
        return super().state_dict() | {"spectral": self.spectral_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load momenta, groups and what is kept of each matrix; see ``load_spectral_state``."""
        super().load_state_dict(state_dict)
        # torch rounds floating state to the parameter's dtype: take float32 momenta from the source.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, param in zip(saved, self._parameters(), strict=True):
            if "momentum_buffer" in self.state[param]:
                source = state_dict["state"][index]["momentum_buffer"]
                dtype = torch.promote_types(param.dtype, torch.float32)
                self.state[param]["momentum_buffer"] = source.to(param.device, dtype, copy=True)
        self.load_spectral_state(state_dict.get("spectral", {}))

    def spectral_state(self) -> dict[str, MatrixState]:
        """What is kept of each logical matrix beside its momentum, by its global name, on the host.

        Of those that this rank works on: with ``owner`` each rank of a tensor-parallel group has others.
        One transfer from the device a batch.
        """
        kept = dict(self._loaded)
        for batch in self._batches or ():
            if batch.cache is not None:
                names = [member.name for member in batch.here]
                kept |= dict(zip(names, self.matrix_states(batch), strict=True))
        return kept

    def load_spectral_state(self, states: dict[str, MatrixState]) -> None:
        """Start from what ``spectral_state`` gave; what is missing or does not fit is found anew."""
        self.reset_caches()
        self._loaded = dict(states)

    def take_loaded(self, batch: MatrixBatch) -> list[MatrixState | None]:
        """The loaded state of each of ``batch.here``, which is not kept any longer."""
        states = {member.name: self._loaded.pop(member.name, None) for member in batch.members}
        return [states[member.name] for member in batch.here]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; batches are made anew.

        Raises:
            ValueError: a parameter that is no matrix, or a setting outside its rule.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group, has_layouts=self._find_layout is not None)
        except ValueError:
            self.param_groups.pop()
            raise
        self._loaded, self._batches = self.spectral_state(), None

    def reset_caches(self) -> None:
        """Forget what is known of the weights' spectra; call it after editing weights by hand."""
        self._batches, self._loaded = None, {}

    def __getstate__(self) -> dict[str, Any]:
        """All attributes for copy and pickle, but for batches, which hold this object's parameters."""
        return self.__dict__ | {"_batches": None, "_loaded": self.spectral_state()}

    @property
    def batches(self) -> list[MatrixBatch]:
        """Batches of logical matrices, in the order in which a step takes them."""
        # Made late: Megatron puts fp32 master weights into the groups after construction.
        if self._batches is None:
            self._batches = make_batches(self.param_groups, self._layout, self.shared, self.polar_work())
        return self._batches

    def _layout(self, group: dict[str, Any], position: int) -> ParameterLayout:
        param = group["params"][position]
        if self._find_layout is not None:
            return self._find_layout(param)
        names = group.get("param_names")
        if names:
            return ParameterLayout(names[position], (whole(param.shape),))
        index = next(i for i, candidate in enumerate(self.param_groups) if candidate is group)
        return ParameterLayout(f"param_groups[{index}].params[{position}]", (whole(param.shape),))

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
        for param in self._parameters():
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(
                    "a spectral step needs dense gradients; give a parameter with sparse "
                    "gradients to torch.optim.SparseAdam"
                )
            update_momentum_(self.state[param]["momentum_buffer"], param.grad, self._momentum)
        for batch in self.batches:
            # Cut batches always take part: the other ranks of the group wait for this one.
            if batch.shards is not None or any(m.param.grad is not None for m in batch.members):
                self._step_batch(batch)
        return loss

    def _step_batch(self, batch: MatrixBatch) -> None:
        shards = torch.stack([batch.weights(), self._directions(batch)])
        W, N = batch.placement.spread(shards)
        if self._weight_decay:
            W.mul_(1 - batch.group["lr"] * self._weight_decay)
        self.update_batch_(batch, W, N)
        batch.write_(batch.placement.collect(W))

    def _directions(self, batch: MatrixBatch) -> Tensor:
        params = [member.param for member in batch.members]
        momenta = batch.read(self.state[p]["momentum_buffer"] for p in params)
        gradients = batch.read(torch.zeros_like(p) if p.grad is None else p.grad for p in params)
        return direction(momenta, gradients, self._momentum, self._nesterov)

    def update_batch_(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        """Take the algorithm's step in place.

        Args:
            batch: gives the group's settings and holds the algorithm's cache and statistics.
            W: ``(b, p, q)`` weights of ``batch.here``, of which there may be none, float32 or float64;
                whole matrices, or rows of them where ``batch.placement.total`` sums over the others.
            N: ``(b, p, q)`` momentum direction, same dtype.
        """
        raise NotImplementedError

    def matrix_states(self, batch: MatrixBatch) -> list[MatrixState]:
        """What is kept of each of ``batch.here``: tensors of their own, on the host."""
        raise NotImplementedError

    def fits(self, batch: MatrixBatch, state: MatrixState) -> bool:
        """Whether ``matrix_states`` of another layout or setting can be gone on with in this one."""
        raise NotImplementedError

    def polar_work(self) -> PolarWork:
        """What a step on one matrix does, for the cost model that chooses placements."""
        raise NotImplementedError


def _check_group(group: dict[str, Any], has_layouts: bool) -> None:
    for param in group["params"]:
        # A layout may see matrices in a tensor of more dimensions, such as packed experts.
        if param.ndim < 2 or param.numel() == 0 or (param.ndim > 2 and not has_layouts):
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
