"""SpectralAdam as a torch optimizer."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.linalg.block_iteration import find_block
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.batches import MatrixBatch, Member
from sso_megatron.optimizers.config import SpectralAdamConfig, SpectralConfig
from sso_megatron.optimizers.matrix_optimizer import FindLayout, MatrixState
from sso_megatron.optimizers.settings import one_config
from sso_megatron.parallel.cost import PolarWork, thin_summed_bytes
from sso_megatron.parallel.shards import Cut, copy_all_
from sso_megatron.updates.spectral_adam import SpectralAdamCache, SpectralAdamRule, spectral_adam_step_


class SpectralAdam(SpectralOptimizer):
    """AdamW whose gradient is divided by its spectral norm where its norm jumps, and every so many steps.

    For every 2-D parameter, or every logical matrix of it, where ``find_layout`` names them. State is
    AdamW's, and a vector and a number for each matrix.

    Collectives: see ``SpectralOptimizer``. Host synchronisations: of the first step alone.

    Example:
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> optimizer = SpectralAdam(matrices, lr=3e-4)
    """

    state_names = ("exp_avg", "exp_avg_sq")
    counts_steps = True
    own_columns = ("divided",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-4,
        *,
        config: SpectralAdamConfig | None = None,
        shared: SpectralConfig | None = None,
        find_layout: FindLayout | None = None,
        **settings: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: 2-D parameters, or groups of them; a group may have its own ``lr`` and nothing else.
            lr: learning rate; the paper trains with 3e-4.
            config: settings as one object, instead of ``settings``.
            shared: settings that all spectral optimizers share.
            find_layout: gives a parameter's ``ParameterLayout``; without it every parameter is one
                matrix.
            settings: fields of ``SpectralAdamConfig`` by name.

        Raises:
            ValueError: a setting outside its rule, or a parameter that is no matrix.
            TypeError: a setting that does not exist, or ``config`` and ``settings`` together.
        """
        c = self.config = one_config(SpectralAdamConfig, config, settings)
        self._rule = SpectralAdamRule(c.high_threshold, c.low_threshold, c.period, c.beta1, c.beta2, c.eps)
        super().__init__(
            params,
            lr=lr,
            weight_decay=c.weight_decay,
            shared=shared or SpectralConfig(),
            find_layout=find_layout,
        )

    def take_gradient_(self, param: Tensor, gradient: Tensor) -> None:
        """Nothing yet: the averages need the gradient's spectral norm first."""

    def read_directions(self, members: list[Member], places: list[Tensor]) -> None:
        """The gradient."""
        self.read_gradients(members, places)

    def update_batch_(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        """Take the step in place; see ``updates.spectral_adam.spectral_adam_step_``."""
        if batch.mode == "owner":
            raise ValueError(
                f"tp_mode={self.shared.tp_mode!r} gives whole matrices to owners, and SpectralAdam's "
                "averages stay with the shards; use distributed"
            )
        view = batch.shard_view
        averages = torch.zeros((2, *W.shape), dtype=W.dtype, device=W.device)
        stored = [self.read_state(batch.here, name) for name in self.state_names]
        places = [batch.placement.local_shards(average) for average in averages]
        for some, values in zip(places, stored, strict=True):
            copy_all_(some, values)
        if view.first_column is not None:
            W, N, averages = W.mT, N.mT, averages.mT
        if batch.cache is None:
            batch.cache = self._start(batch, N)
        batch.stats = spectral_adam_step_(
            W,
            N,
            averages[0],
            averages[1],
            batch.group["step"],
            batch.cache,
            lr=batch.group["lr"],
            rule=self._rule,
            view=view,
        )
        for name, values in zip(self.state_names, places, strict=True):
            for member, value in zip(batch.here, values, strict=True):
                if member.param.grad is not None:
                    member.split.write_(self.state[member.param][name], value)

    def _start(self, batch: MatrixBatch, G: Tensor) -> SpectralAdamCache:
        """From a checkpoint, else from the first gradient."""
        states = self.take_loaded(batch)
        known = [state if state and self.fits(batch, state) else None for state in states]
        v = G.new_empty(len(known), batch.shape[1], 1) if all(known) else find_block(G, 1, batch.shard_view)
        # The first step of all divides; a norm that is lost later, NaN, is no jump.
        unknown = 0.0 if batch.group["step"] == 1 else torch.nan
        norm = torch.full((len(known),), unknown, dtype=torch.float64, device=G.device)
        for index, state in enumerate(known):
            if state:
                v[index].copy_(state["gradient_vector"])
                norm[index].copy_(state["gradient_norm"])
        return SpectralAdamCache(v, norm)

    def matrix_states(self, batch: MatrixBatch) -> list[MatrixState]:
        """The gradient's right singular vector and the last gradient's norm."""
        vectors, norms = batch.cache.v.cpu(), batch.cache.norm.cpu()
        return [
            {"gradient_vector": v.clone(), "gradient_norm": norm.clone()}
            for v, norm in zip(vectors, norms, strict=True)
        ]

    def fits(self, batch: MatrixBatch, state: MatrixState) -> bool:
        """Whether vector and norm are there."""
        has_vector = "gradient_vector" in state and state["gradient_vector"].shape == (batch.shape[1], 1)
        return has_vector and "gradient_norm" in state

    def measured(self, batch: MatrixBatch) -> dict[str, Tensor]:
        """``divided``: whether the gradient was divided by its spectral norm."""
        return {"divided": batch.stats.divided}

    def polar_work(self) -> PolarWork:
        """No Newton-Schulz iteration at all."""
        return PolarWork(0, 0)

    def thin_sums(self, cut: Cut) -> tuple[int, ...]:
        """A vector's: gradients never travel."""
        return thin_summed_bytes(cut.shape, cut.dim, 1)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Weight, gradient and a copy of it for its norm, both averages, and vectors."""
        return self._workspace(shape, shape, dtype)

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """As of a whole matrix of the shard's size, but for the vectors of all columns."""
        return self._workspace(cut.largest_shape, cut.shape, dtype)

    def _workspace(self, held: tuple[int, int], whole: tuple[int, int], dtype: torch.dtype) -> int:
        thin = (7 * held[0] + 5 * whole[1]) * torch.float64.itemsize
        return 5 * held[0] * held[1] * dtype.itemsize + thin
