"""SSO and MuonSphere as torch optimizers (arXiv 2601.08393)."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sso_megatron.linalg.coefficients import polar_coefficients
from sso_megatron.linalg.symmetric import Products, load_kernel
from sso_megatron.matrices.scaling import target_radius, update_scale
from sso_megatron.optimizers.base import SpectralOptimizer
from sso_megatron.optimizers.batches import MatrixBatch
from sso_megatron.optimizers.cached_state import CachedField
from sso_megatron.optimizers.config import SSOConfig
from sso_megatron.parallel.cost import PolarWork
from sso_megatron.parallel.shards import Cut, copy_all_
from sso_megatron.updates.sso import (
    SpectralCache,
    SSORule,
    blank_cache,
    retract_to_spectral_sphere_,
    retraction_factor,
    sso_step_,
    start_cache,
)

# Published means of the search are 5.1 trials at a tolerance of 1e-3 and 8.9 at 1e-4; ours is 2e-4.
_BISECTION_TRIALS = 7


@dataclass
class _Cache(SpectralCache):
    """The step's cache, and the setting that its radii were made with.

    Attributes:
        radius_scaler: ``(b,)`` float64 on the host, the ``radius_scaler`` that is a factor of ``radius``.
    """

    radius_scaler: Tensor = field(kw_only=True)


class SSO(SpectralOptimizer):
    """Spectral Sphere Optimizer: steepest descent under the spectral norm, on a spectral sphere.

    For every 2-D parameter (or every logical matrix of it, where ``find_layout`` names them) a step
    retracts the weight to the sphere of radius R and then moves it along the steepest direction that
    is tangent to the sphere. Weights between steps are therefore off the sphere by one update, as
    in the paper. Momentum is kept in float32 (float64 for float64 parameters).

    Collectives: see ``SpectralOptimizer``. Host synchronisations of a warm step: none with the tracking
    solver, one a trial with bisection.

    Example:
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> optimizer = SSO(matrices, lr=1e-2, radius_scaler=2.0)
    """

    config_cls = SSOConfig
    config: SSOConfig
    works_on_shards = True
    finds_norms = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        *,
        config: SSOConfig | None = None,
        **options: Any,
    ) -> None:
        """Make the optimizer.

        Args:
            params: 2-D parameters, or groups of them; see ``SpectralOptimizer``.
            lr: learning rate; the paper trains with 5e-3.
            config: settings as one object, instead of by name.
            options: ``shared``, ``find_layout`` and fields of ``SSOConfig``; see ``SpectralOptimizer``.

        Raises:
            ImportError: the package of ``symmetric_kernel`` is not installed.
        """
        super().__init__(params, lr, config=config, **options)
        self.config = c = self._complete(self.config)
        if c.symmetric_kernel != "torch":
            load_kernel(c.symmetric_kernel)
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
            products=Products(c.msign_precision, c.symmetric_kernel),
        )

    def _complete(self, config: SSOConfig) -> SSOConfig:
        return config

    @property
    def own_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the numbers about the sphere and the search for lambda; see ``measured``."""
        bounded = ("relative_step",) if self._rule.hard_retraction else ()
        search = ("lam", "num_trials", "converged") if self._search else ()
        ranked = () if self._search == "bisection" else ("nuclear_rank",)
        return ("radius", "radius_error", *bounded, "residual", *search, *ranked)

    def measured(self, batch: MatrixBatch) -> dict[str, Tensor]:
        """Return what the step found out about each matrix.

        ``radius_error``: ``||W||_2 / R - 1`` before the step; ``relative_step``: ``lr scale / R``, by which
        one step changes that at most; ``nuclear_rank``: ``||Z||_*^2 / ||Z||_F^2`` of what ``msign`` was
        taken of, the momentum and SSO's ``lam u v^T``.
        """
        stats, cache, lr = batch.stats, batch.cache, batch.group["lr"]
        # The step found the norm after weight decay.
        config = self.config_of(batch.group)
        norms = stats.sigma / (1 - lr * config.weight_decay)
        known = {"radius": cache.radius, "radius_error": norms / cache.radius - 1, "spectral_norm": norms}
        scale = update_scale(batch.shape, config.scale_mode, cache.radius)
        known["relative_step"] = lr * scale / cache.radius
        names = ("lam", "residual", "num_trials", "converged", "nuclear_rank")
        return known | {name: getattr(stats, name) for name in names}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group. The next step makes its batches anew.

        Raises:
            ValueError: a parameter that is no matrix, a setting outside its rule, or matrices that may
                move to ranks that do not know their radii.
        """
        batches = self._schedule.batches if self._schedule else []
        if self.config.radius_mode == "from_weights" and any(b.mode == "owner" for b in batches):
            raise ValueError(
                "a parameter group that is added after the first step gives cut matrices to other owners, "
                "and with radius_mode='from_weights' only the first knows their radii; add it before, or "
                "use tp_mode='duplicated'"
            )
        super().add_param_group(param_group)

    @property
    def _search(self) -> str | None:
        """The solver that a step runs; None where it runs none."""
        return self._rule.solver if self._rule.tangent == "solve" else None

    def polar_work(self) -> PolarWork:
        """Return the Newton-Schulz iterations of a warm step, for bisection the published mean."""
        num_trials = _BISECTION_TRIALS if self._search == "bisection" else 1
        num_measures = self._rule.num_trials - 1 if self._search == "tracking" else 0
        return PolarWork(num_trials, len(self._rule.coefficients), num_measures)

    def workspace(self, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Count weight, shifted momentum and two iterates, and squares of the short side."""
        numel, short, long = shape[0] * shape[1], min(shape), max(shape)
        # Bisection keeps the best trial of each matrix, and copies those that go on; tracking has the Gram
        # matrix that all trials but the last work on.
        copies, squares = {None: (4, 2), "tracking": (4, 4), "bisection": (9, 2)}[self._search]
        iterating = copies * numel + squares * short**2
        if self._search == "tracking":  # trials of the first step, of a single matrix
            iterating = max(iterating, 5 * numel + 2 * short**2)
        retracting = 2 * numel + min(self._rule.power_block, short) * (4 * long + 10 * short)
        return max(retracting, iterating + 32 * long) * dtype.itemsize

    def cut_workspace(self, cut: Cut, dtype: torch.dtype) -> int:
        """Count shards of weight and momentum, and in float64 three more and squares of the whole side."""
        rows, columns = max(cut.lengths), cut.shape[1 - cut.dim]
        squares = 11 if self._search == "bisection" else 9
        in_double = 3 * rows * columns + squares * columns**2
        return 2 * rows * columns * dtype.itemsize + in_double * torch.float64.itemsize

    def update_batch_(self, batch: MatrixBatch, W: Tensor, N: Tensor) -> None:
        """Retract, solve and update a batch in place; see ``updates.sso.sso_step_``."""
        self._warm_up(batch, W)
        batch.stats = sso_step_(
            W,
            N,
            batch.cache,
            scale=update_scale(batch.shape, self.config_of(batch.group).scale_mode, batch.cache.radius),
            lr=batch.group["lr"],
            rule=self._rule,
            all_reduce=batch.placement.all_reduce,
            measures=self.measures is not None,
        )

    def _warm_up(self, batch: MatrixBatch, W: Tensor) -> None:
        """Make the cache of a batch that has none: from a checkpoint, else from the weights."""
        if batch.cache is not None:
            return
        cache = self.make_cache(batch, lambda is_known: self._new_cache(batch, W, is_known))
        scaler = self.config_of(batch.group).radius_scaler
        for radius, loaded in zip(cache.radius, cache.radius_scaler.tolist(), strict=True):
            if loaded != scaler:  # by the ratio, and not at all where it is 1: c R / c is not always R
                radius.mul_(scaler / loaded)
        cache.radius_scaler.fill_(scaler)

    def _new_cache(self, batch: MatrixBatch, W: Tensor, is_known: bool) -> _Cache:
        found = (blank_cache if is_known else start_cache)(W, self._rule, batch.placement.all_reduce)
        self._refuse_zeros(batch, found.radius)
        c = self.config_of(batch.group)
        if c.radius_mode == "from_weights":
            found.radius.mul_(c.radius_scaler)
        else:
            found.radius.fill_(target_radius(batch.shape, c.radius_mode, c.radius_scaler))
        scalers = torch.full((len(W),), c.radius_scaler, dtype=torch.float64)  # precise as the setting
        return _Cache(**vars(found), radius_scaler=scalers)

    def _refuse_zeros(self, batch: MatrixBatch, norms: Tensor) -> None:
        # The one look at values on the host, before the first step; every rank sees all of them, so that
        # none goes on alone. A master copy requires no gradient, yet has one.
        dead = [
            member.name
            for member, norm in zip(
                batch.members, batch.placement.broadcast_values(norms).tolist(), strict=True
            )
            if (member.param.requires_grad or member.param.grad is not None) and not norm > 0
        ]
        if dead:
            raise ValueError(
                f"{', '.join(dead)}: a weight of spectral norm 0 (or not finite) has no place on a "
                "sphere; initialise it with random values, or exclude it from the spectral optimizer"
            )

    def cached_fields(self, shape: tuple[int, int]) -> tuple[CachedField, ...]:
        """Return singular vectors, the search's state and, with ``from_weights``, radius and factor."""
        side, height = ("right_vectors" if shape[0] >= shape[1] else "left_vectors"), min(shape)
        fields = (
            CachedField(side, "basis", (height, min(self.config.power_block, height))),
            CachedField("lam", "lam"),
            CachedField("slope", "slope"),
            # Checkpoints of earlier revisions do not have it: their search is taken to have found the root.
            CachedField("h", "h", default=0.0),
            CachedField("is_cold", "is_cold", default=False),
        )
        if self.config.radius_mode != "from_weights":
            return fields
        return *fields, CachedField("radius", "radius"), CachedField("radius_scaler", "radius_scaler")

    @torch.no_grad()
    def retracted(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yield name, whole weight on the sphere and radius of every logical matrix; weights do not change.

        The weight is a copy, retracted by the code of a step. Every rank of a tensor-parallel group must
        run through the whole iterator.

        Collectives: those of each batch's placement, ``broadcast_values`` included, and one all-gather for
        each batch that is cut.
        """
        for batch in self.batches:
            buffer, (slots,) = batch.placement.allocate(1, **batch.options)
            copy_all_(slots, batch.weights())
            (W,) = batch.placement.gather(buffer, 1)
            self._warm_up(batch, W)
            radii = batch.placement.broadcast_values(batch.cache.radius).tolist()
            top = retract_to_spectral_sphere_(
                W,
                dataclasses.replace(batch.cache, basis=batch.cache.basis.clone()),
                lr=batch.group["lr"],
                rule=self._rule,
                all_reduce=batch.placement.all_reduce,
            )
            factors = retraction_factor(top.sigma, batch.cache.radius, batch.group["lr"], self._rule)
            shards = zip(batch.weights(), batch.placement.broadcast_values(factors), strict=True)
            matrices = batch.whole([shard * factor for shard, factor in shards])
            for member, matrix, radius in zip(batch.members, matrices, radii, strict=True):
                yield member.name, matrix, radius


class MuonSphere(SSO):
    """Muon on the spectral sphere: retract, then step along ``msign`` of the momentum.

    SSO with ``tangent="none"``; the other settings are the same.
    """

    def _complete(self, config: SSOConfig) -> SSOConfig:
        if config.tangent not in ("solve", "none"):
            raise ValueError(f"tangent={config.tangent!r} is not MuonSphere's; leave it out, or use SSO")
        return dataclasses.replace(config, tangent="none")
