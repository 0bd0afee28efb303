"""SpectralAdam as a torch optimizer."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.linalg.block_iteration import find_block
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.batches import MatrixBatch, Member
from sso_megatron.optimizers.cached_state import CachedField
from sso_megatron.optimizers.config import SpectralAdamConfig
from sso_megatron.parallel.cost import thin_summed_bytes
from sso_megatron.parallel.shards import Cut, copy_all_
from sso_megatron.updates.spectral_adam import SpectralAdamCache, SpectralAdamRule, spectral_adam_step_


class SpectralAdam(SpectralOptimizer):
    """AdamW whose gradient is divided by its spectral norm where its norm jumps, and every so many steps.

    Every 2-D parameter is one matrix, or several logical matrices where ``find_layout`` names them. State
    is AdamW's, and a vector and a number for each matrix.

    Collectives: see ``SpectralOptimizer``. Only the first step synchronises with the host.

    Example:
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> optimizer = SpectralAdam(matrices, lr=3e-4)
    """

    config_cls = SpectralAdamConfig
    config: SpectralAdamConfig
    works_on_shards = True
    state_names = ("exp_avg", "exp_avg_sq")
    counts_steps = True
    own_columns = ("divided",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-4,
        *,
        config: SpectralAdamConfig | None = None,
        **options: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: 2-D parameters, or groups of them; see ``SpectralOptimizer``.
            lr: learning rate; the paper trains with 3e-4.
            config: settings as one object, instead of by name.
            options: ``shared``, ``find_layout`` and fields of ``SpectralAdamConfig``; see
                ``SpectralOptimizer``.
        """
        super().__init__(params, lr, config=config, **options)

    def take_gradient_(self, param: Tensor, gradient: Tensor) -> None:
        """Do nothing yet: the averages need the gradient's spectral norm first."""

    def read_directions(self, members: list[Member], places: list[Tensor]) -> None:
        """Copy the gradient into the places given."""
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
            self.make_cache(batch, lambda is_known: self._new_cache(batch, N, is_known))
        c = self.config_of(batch.group)
        batch.stats = spectral_adam_step_(
            W,
            N,
            averages[0],
            averages[1],
            batch.group["step"],
            batch.cache,
            lr=batch.group["lr"],
            rule=SpectralAdamRule(c.high_threshold, c.low_threshold, c.period, c.beta1, c.beta2, c.eps),
            view=view,
        )
        for name, values in zip(self.state_names, places, strict=True):
            for member, value in zip(batch.here, values, strict=True):
                if member.param.grad is not None:
                    member.split.write_(self.state[member.param][name], value)

    def _new_cache(self, batch: MatrixBatch, G: Tensor, is_known: bool) -> SpectralAdamCache:
        """Make a cache whose vector is found from the first gradient, unless the vector will be loaded."""
        v = G.new_empty(len(G), batch.shape[1], 1) if is_known else find_block(G, 1, batch.shard_view)
        # The first step of all divides; a norm that is lost later, NaN, is no jump.
        unknown = 0.0 if batch.group["step"] == 1 else torch.nan
        return SpectralAdamCache(v, torch.full((len(G),), unknown, dtype=torch.float64, device=G.device))

    def cached_fields(self, shape: tuple[int, int]) -> tuple[CachedField, ...]:
        """Return two fields: the gradient's right singular vector and the last gradient's norm."""
        return CachedField("gradient_vector", "v", (shape[1], 1)), CachedField("gradient_norm", "norm")

    def measured(self, batch: MatrixBatch) -> dict[str, Tensor]:
        """Return ``divided``, whether the gradient was divided by its spectral norm."""
        return {"divided": batch.stats.divided}

    def thin_sums(self, cut: Cut) -> tuple[int, ...]:
        """Return the bytes of one vector in each all-reduce; gradients are never communicated."""
        return thin_summed_bytes(cut.shape, cut.dim, 1)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Count weight, gradient and its copy for the norm, both averages, and vectors."""
        return self._workspace(shape, shape, dtype)

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """Count what a whole matrix of the shard's size takes, but vectors of all columns."""
        return self._workspace(cut.largest_shape, cut.shape, dtype)

    def _workspace(self, held: tuple[int, int], whole: tuple[int, int], dtype: torch.dtype) -> int:
        thin = (7 * held[0] + 5 * whole[1]) * torch.float64.itemsize
        return 5 * held[0] * held[1] * dtype.itemsize + thin
