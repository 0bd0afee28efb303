"""Spectra as a torch optimizer (arXiv 2602.11185)."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.linalg.block_iteration import find_block
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.batches import MatrixBatch, Member
from sso_megatron.optimizers.cached_state import CachedField
from sso_megatron.optimizers.config import SpectraConfig
from sso_megatron.parallel.cost import thin_summed_bytes
from sso_megatron.parallel.shards import Cut, copy_all_
from sso_megatron.updates.momentum import update_heavy_ball_
from sso_megatron.updates.spectra import SpectraCache, SpectraRule, spectra_step_, spike_rank


class Spectra(SpectralOptimizer):
    """Spectra: the momentum with its largest singular values, the spike, brought down to the others' RMS.

    Every 2-D parameter is one matrix, or several logical matrices where ``find_layout`` names them. State
    is the momentum and the spike's right singular vectors: half of AdamW's, or with bf16 a quarter.

    Collectives: see ``SpectralOptimizer``. Only the first step synchronises with the host.

    Example:
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> optimizer = Spectra(matrices, lr=1e-3)
    """

    config_cls = SpectraConfig
    config: SpectraConfig
    works_on_shards = True
    own_columns = ("spike_share",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        config: SpectraConfig | None = None,
        **options: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: 2-D parameters, or groups of them; see ``SpectralOptimizer``.
            lr: learning rate, on AdamW's scale; the paper's is not known to us.
            config: settings as one object, instead of by name.
            options: ``shared``, ``find_layout`` and fields of ``SpectraConfig``; see ``SpectralOptimizer``.
        """
        super().__init__(params, lr, config=config, **options)

    def state_dtype(self, param: Tensor) -> torch.dtype:
        """Return bfloat16 with ``momentum_dtype="bf16"``, else float32, or float64 for such parameters."""
        if self.config.momentum_dtype == "bf16":
            return torch.bfloat16
        return super().state_dtype(param)

    def take_gradient_(self, param: Tensor, gradient: Tensor) -> None:
        """Update the momentum: ``M <- mu M + G``."""
        update_heavy_ball_(self.state[param]["momentum_buffer"], gradient, self._configs[param].momentum)

    def read_directions(self, members: list[Member], places: list[Tensor]) -> None:
        """Copy ``M`` into the places given, or ``G + mu M`` with Nesterov."""
        for config, some, N in self.by_config(members, places):
            momenta = self.read_state(some, "momentum_buffer")
            if not config.nesterov:
                copy_all_(N, momenta)
                continue
            self.read_gradients(some, N)
            torch._foreach_add_(N, momenta, alpha=config.momentum)

    def update_batch_(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        """Take the step in place; see ``updates.spectra.spectra_step_``."""
        view = batch.shard_view
        if view.first_column is not None:
            W, N = W.mT, N.mT
        if batch.cache is None:
            self.make_cache(batch, lambda is_known: self._new_cache(batch, N, is_known))
        c, lr = self.config_of(batch.group), batch.group["lr"]
        rule = SpectraRule(c.power_iterations, c.update_rms, c.eps)
        batch.stats = spectra_step_(W, N, batch.cache, lr=lr, rule=rule, view=view)

    def measured(self, batch: MatrixBatch) -> dict[str, Tensor]:
        """Return ``spike_share``, the part of ``||M||_F^2`` that is the spike's, as far as it was found."""
        spike = batch.stats.spike.square().sum(dim=-1)
        num_others = min(batch.shape) - batch.stats.spike.size(-1)
        tail = batch.stats.tail_rms.square() * num_others
        return {"spike_share": spike / (spike + tail).clamp_min(torch.finfo(spike.dtype).tiny)}

    def _new_cache(self, batch: MatrixBatch, M: Tensor, is_known: bool) -> SpectraCache:
        """Make a cache whose block is found from the first momentum, unless the block will be loaded."""
        rank = self._rank(batch.shape)
        if is_known:
            return SpectraCache(M.new_empty(len(M), batch.shape[1], rank))
        return SpectraCache(find_block(M, rank, batch.shard_view))

    def _rank(self, shape: tuple[int, int]) -> int:
        return spike_rank(shape, self.config.rank_ratio)

    def cached_fields(self, shape: tuple[int, int]) -> tuple[CachedField, ...]:
        """Return the one field, the spike's right singular vectors."""
        return (CachedField("spike_vectors", "V", (shape[1], self._rank(shape))),)

    def thin_sums(self, cut: Cut) -> tuple[int, ...]:
        """Return the bytes of the block in each all-reduce; the momentum is never communicated."""
        return thin_summed_bytes(cut.shape, cut.dim, self._rank(cut.shape), self.config.power_iterations)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Count weight, momentum and its copy for the norm, or float64 thin blocks instead of the copy."""
        return self._workspace(shape, shape, dtype)

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """Count what a whole matrix of the shard's size takes, but the thin block of all columns."""
        return self._workspace(cut.largest_shape, cut.shape, dtype)

    def _workspace(self, held: tuple[int, int], whole: tuple[int, int], dtype: torch.dtype) -> int:
        (m, n), rank = (held[0], whole[1]), self._rank(whole)
        size = held[0] * held[1]
        shaping = (3 * size + (m + 2 * n) * rank) * dtype.itemsize
        thin = (3 * m + 2 * n + 5 * rank) * rank * torch.float64.itemsize
        iterating = (2 * size + (m + n) * rank) * dtype.itemsize + thin
        return max(shaping, iterating)
