"""SSO and MuonSphere as torch optimizers (arXiv 2601.08393)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.matrices.scaling import target_radius, update_scale
from sso_megatron.optimizers.base import FindLayout, SpectralOptimizer
from sso_megatron.optimizers.batches import MatrixBatch
from sso_megatron.optimizers.config import SpectralConfig, SSOConfig
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.updates.sso import (
    SSORule,
    retract_to_spectral_sphere_,
    sso_step_,
    start_cache,
)

# Published means of the search are 5.1 trials at a tolerance of 1e-3 and 8.9 at 1e-4; ours is 2e-4.
_BISECTION_TRIALS = 7


class SSO(SpectralOptimizer):
    """Spectral Sphere Optimizer: steepest descent under the spectral norm, on a spectral sphere.

    For every 2-D parameter (or every logical matrix of it, where ``find_layout`` names them) a step
    retracts the weight to the sphere of radius R and then moves it along the steepest direction that
    is tangent to the sphere. Weights between steps are therefore off the sphere by one update, as
    in the paper. Momentum is kept in float32 (float64 for float64 parameters).

    Collectives: see ``SpectralOptimizer``. Host synchronisations of a warm step: with the tracking solver
    only that of ``torch.linalg.eigh`` on a CUDA device, one a batch; with bisection one more a trial.

    Example:
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> optimizer = SSO(matrices, lr=1e-2, radius_scaler=2.0)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 5e-3,
        *,
        config: SSOConfig | None = None,
        shared: SpectralConfig | None = None,
        find_layout: FindLayout | None = None,
        **settings: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: 2-D parameters, or groups of them; a group may have its own ``lr`` and nothing else.
            lr: learning rate; the paper trains with 5e-3.
            config: settings as one object, instead of ``settings``.
            shared: settings that all spectral optimizers share.
            find_layout: gives a parameter's ``ParameterLayout``; without it every parameter is one
                matrix.
            settings: fields of ``SSOConfig`` by name.

        Raises:
            ValueError: a setting outside its rule, or a parameter that is no matrix.
            TypeError: a setting that does not exist, or ``config`` and ``settings`` together.
        """
        if config is not None and settings:
            raise TypeError(f"give config or {', '.join(settings)}, not both")
        self.config = self._complete(config or SSOConfig(**settings))
        c = self.config
        self._rule = SSORule(
            coefficients=polar_coefficients(c.coefficient_type, c.msign_steps),
            tangent=c.tangent,
            solver=c.solver,
            num_trials=c.solver_trials,
            tolerance=c.solver_tolerance,
            max_iterations=c.solver_max_iterations,
            hard_retraction=c.retract_mode == "hard",
            retract_alpha=c.retract_alpha,
            power_block=c.power_block,
            power_degree=c.power_degree,
        )
        super().__init__(
            params,
            lr=lr,
            momentum=c.momentum,
            nesterov=c.nesterov,
            weight_decay=c.weight_decay,
            shared=shared or SpectralConfig(),
            find_layout=find_layout,
        )

    def _complete(self, config: SSOConfig) -> SSOConfig:
        return config

    def radius(self, batch: MatrixBatch) -> float:
        """Target spectral norm R of the batch's matrices."""
        return target_radius(batch.shape, self.config.radius_mode, self.config.radius_scaler)

    def polar_work(self) -> PolarWork:
        """Newton-Schulz iterations of a warm step; bisection is taken at its published mean."""
        searches = self._rule.tangent == "solve"
        is_tracking = self._rule.solver == "tracking"
        num_trials = (self._rule.num_trials if is_tracking else _BISECTION_TRIALS) if searches else 1
        return PolarWork(num_trials, len(self._rule.coefficients))

    def update_batch_(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        """Retract, solve and update a batch in place; see ``updates.sso.sso_step_``."""
        self._warm_up(batch, W)
        radius = self.radius(batch)
        batch.stats = sso_step_(
            W,
            N,
            batch.cache,
            radius=radius,
            scale=update_scale(batch.shape, self.config.scale_mode, radius),
            lr=batch.group["lr"],
            rule=self._rule,
            total=batch.placement.total,
        )

    def _warm_up(self, batch: MatrixBatch, W: Tensor) -> None:
        if batch.cache is not None:
            return
        cache, sigma = start_cache(W, self._rule, batch.placement.total)
        # The one look at values on the host, before the first step; every rank sees all of them, so that
        # none goes on alone. A master copy requires no gradient, yet has one.
        norms = batch.placement.share(sigma).tolist()
        dead = [
            member.name
            for member, norm in zip(batch.members, norms, strict=True)
            if (member.param.requires_grad or member.param.grad is not None) and not norm > 0
        ]
        if dead:
            raise ValueError(
                f"{', '.join(dead)}: a weight of spectral norm 0 (or not finite) has no place on a "
                "sphere; initialise it with random values, or exclude it from the spectral optimizer"
            )
        batch.cache = cache

    @torch.no_grad()
    def retracted(self) -> Iterator[tuple[str, Tensor, float]]:
        """Name, whole weight on the sphere and radius of every logical matrix, leaving weights alone.

        This is what a step's retraction would give now, by the same code, on a copy. Every rank of a
        tensor-parallel group must run through it.

        Collectives: those of each batch's placement, and one all-gather for each batch that is cut.
        """
        for batch in self.batches:
            (W,) = batch.placement.spread(batch.weights().unsqueeze(0))
            radius = self.radius(batch)
            self._warm_up(batch, W)
            retract_to_spectral_sphere_(
                W,
                dataclasses.replace(batch.cache),
                radius=radius,
                lr=batch.group["lr"],
                rule=self._rule,
                total=batch.placement.total,
            )
            matrices = batch.whole(batch.placement.collect(W))
            for member, matrix in zip(batch.members, matrices, strict=True):
                yield member.name, matrix, radius


class MuonSphere(SSO):
    """Muon on the spectral sphere: retract, then step along ``msign`` of the momentum.

    SSO with ``tangent="none"``; the other settings are the same.
    """

    def _complete(self, config: SSOConfig) -> SSOConfig:
        if config.tangent not in ("solve", "none"):
            raise ValueError(f"tangent={config.tangent!r} is not MuonSphere's; leave it out, or use SSO")
        return dataclasses.replace(config, tangent="none")
