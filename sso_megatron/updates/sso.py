"""One step of the Spectral Sphere Optimizer on a batch of whole matrices (arXiv 2601.08393).

Steepest descent under the spectral norm with the weight held on a spectral sphere. Algorithm 1 of the
paper, after the momentum: find ``(sigma, u, v)`` of ``W``, retract ``W`` to the sphere, find ``lam``
with ``<u v^T, msign(M + lam u v^T)> = 0``, and step along that ``msign``. MuonSphere is the same
without the search.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.linalg.polar import frobenius_normalize, msign
from sso_megatron.linalg.power_iteration import TopSingular, power_iteration, start_basis
from sso_megatron.linalg.root_finding import Root, bisect_root, track_root


@dataclass(frozen=True)
class SSORule:
    """How the step is taken; every number that does not change from matrix to matrix.

    Attributes:
        coefficients: Newton-Schulz polynomials of ``msign``.
        tangent: ``solve``, ``project`` or ``none``.
        solver: ``tracking`` or ``bisection``; matters for ``solve`` alone.
        num_trials: trials of the tracking solver once it is warm.
        tolerance: on ``|h(lam)|``; bisection stops there.
        max_iterations: halvings of the bisection.
        hard_retraction: scale to the radius exactly; otherwise by ``1 +- alpha lr``.
        retract_alpha: ``alpha`` of the dynamic retraction (eq. 34).
        power_block: columns of the power iteration.
        power_degree: degree of its filter.
    """

    coefficients: Coefficients
    tangent: str
    solver: str
    num_trials: int
    tolerance: float
    max_iterations: int
    hard_retraction: bool
    retract_alpha: float
    power_block: int
    power_degree: int


@dataclass
class SpectralCache:
    """What a batch keeps from step to step.

    Attributes:
        basis: ``(b, min(m, n), k)`` block of the power iteration.
        lam: ``(b,)`` where the next search for the root starts.
        slope: ``(b,)`` slope of ``h`` at the root.
        is_cold: no step has used it yet, so that the search may take more trials.
    """

    basis: Tensor
    lam: Tensor
    slope: Tensor
    is_cold: bool = True


@dataclass(frozen=True)
class SSOStats:
    """What a step saw, one entry a matrix, on the device; nothing is synchronised.

    Attributes:
        sigma: ``(b,)`` spectral norm of the weight before retraction.
        lam: ``(b,)`` accepted ``lam``.
        residual: ``(b,)`` ``h(lam)`` before it was removed.
        num_trials: ``(b,)`` ``msign`` evaluations.
        converged: ``(b,)`` ``|h(lam)| <= tolerance``.
    """

    sigma: Tensor
    lam: Tensor
    residual: Tensor
    num_trials: Tensor
    converged: Tensor


# A start without state: passes of the power iteration (random block, no gap known), trials of the
# tracking solver, and a slope in the middle of what small GPTs show (5 .. 30).
_COLD_PASSES = 8
_COLD_TRIALS = 8
_COLD_SLOPE = 10.0
# First step of the published bracket; lam* was seen between 1e-5 and 0.2.
_BRACKET_STEP = 1e-3


def start_cache(W: Tensor, rule: SSORule) -> tuple[SpectralCache, Tensor]:
    """Cache for a batch that has none, and the spectral norms ``(b,)`` found on the way.

    Args:
        W: ``(b, m, n)`` float32 or float64.
        rule: the step's settings.
    """
    top = power_iteration(
        W, start_basis(W, rule.power_block), degree=rule.power_degree, num_passes=_COLD_PASSES
    )
    lam = torch.zeros_like(top.sigma)
    return SpectralCache(top.basis, lam, torch.full_like(lam, _COLD_SLOPE)), top.sigma


def retraction_factor(sigma: Tensor, radius: float, lr: float, rule: SSORule) -> Tensor:
    """Factor that takes weights of norm ``sigma`` ``(b,)`` to, or towards, the sphere of ``radius``.

    Hard: ``R / sigma``. Dynamic: ``1 + alpha lr sign(R - sigma)`` (eq. 34, with the paper's ``lr``).
    """
    if rule.hard_retraction:
        # A weight that became zero cannot be scaled; the update gives it a direction.
        return torch.where(sigma > 0, radius / sigma, 1.0)
    return 1 + rule.retract_alpha * lr * torch.sign(radius - sigma)


def retract_to_spectral_sphere_(
    W: Tensor, cache: SpectralCache, *, radius: float, lr: float, rule: SSORule
) -> TopSingular:
    """Find the top singular triplet of every ``W`` and scale it to the sphere, in place.

    Args:
        W: ``(b, m, n)`` float32 or float64.
        cache: its basis is used and replaced.
        radius: target spectral norm.
        lr: learning rate, which dynamic retraction needs.
        rule: the step's settings.

    Returns:
        The triplet of the weight before it was scaled.
    """
    top = power_iteration(W, cache.basis, degree=rule.power_degree)
    cache.basis = top.basis
    W.mul_(retraction_factor(top.sigma, radius, lr, rule)[:, None, None])
    return top


def sso_step_(
    W: Tensor,
    N: Tensor,
    cache: SpectralCache,
    *,
    radius: float,
    scale: float,
    lr: float,
    rule: SSORule,
) -> SSOStats:
    """Retract, solve, update: ``W <- retract(W) - lr * scale * Phi`` in place.

    Args:
        W: ``(b, m, n)`` weights, float32 or float64, whole logical matrices.
        N: ``(b, m, n)`` momentum direction, same dtype.
        cache: used and updated.
        radius: target spectral norm R.
        scale: factor of the update.
        lr: learning rate.
        rule: the step's settings.
    """
    top = retract_to_spectral_sphere_(W, cache, radius=radius, lr=lr, rule=rule)
    M = frobenius_normalize(N)
    searches = rule.tangent == "solve"
    root = _solve(M, top, cache, rule) if searches else _at_zero(M, top, rule)
    cache.is_cold = False
    Phi = root.extra
    if rule.tangent != "none":
        # <Theta, Phi> = h exactly, so this puts Phi on the tangent space whatever the search left.
        Phi = _add_rank_one(Phi, -root.value, top)
    W.add_(Phi, alpha=-lr * scale)
    return SSOStats(top.sigma, root.lam, root.value, root.num_trials, root.converged)


def _add_rank_one(X: Tensor, weight: Tensor, top: TopSingular) -> Tensor:
    """``X + weight u v^T`` for ``X`` ``(b, m, n)`` and ``weight`` ``(b,)``."""
    return torch.baddbmm(X, (weight[:, None] * top.u).unsqueeze(-1), top.v.unsqueeze(-2))


def _inner(Phi: Tensor, top: TopSingular) -> Tensor:
    """``<u v^T, Phi>``, ``(b,)``."""
    return (top.u * (Phi @ top.v.unsqueeze(-1)).squeeze(-1)).sum(dim=-1)


def _at_zero(M: Tensor, top: TopSingular, rule: SSORule) -> Root:
    """The plain ``msign(M)`` as a root at ``lam = 0`` that was not searched for."""
    Phi = msign(M, rule.coefficients)
    h = _inner(Phi, top)
    return Root(
        torch.zeros_like(h),
        h,
        Phi,
        torch.ones_like(h, dtype=torch.int64),
        h.abs() <= rule.tolerance,
    )


def _solve(M: Tensor, top: TopSingular, cache: SpectralCache, rule: SSORule) -> Root:
    """``lam`` with ``h(lam) = <u v^T, msign(M + lam u v^T)> = 0`` and the ``msign`` there."""
    # A zero momentum has no direction: msign(lam u v^T) would be a step along the weight itself.
    moves = M.abs().amax(dim=(-2, -1)) > 0

    def evaluate(lam: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        part = top if rows is None else TopSingular(top.sigma[rows], top.u[rows], top.v[rows], top.basis)
        mask = moves if rows is None else moves[rows]
        X = _add_rank_one(M if rows is None else M[rows], lam, part)
        Phi = msign(X, rule.coefficients) * mask[:, None, None]
        return _inner(Phi, part), Phi

    if rule.solver == "bisection":
        return bisect_root(
            evaluate,
            torch.zeros_like(top.sigma),
            first_step=_BRACKET_STEP,
            # |lam*| <= 2 ||M||_* (theorem A.3), and ||M||_* <= sqrt(rank) for ||M||_F = 1.
            bound=2 * math.sqrt(min(M.shape[-2:])),
            tolerance=rule.tolerance,
            max_iterations=rule.max_iterations,
        )
    found = track_root(
        evaluate,
        cache.lam,
        cache.slope,
        tolerance=rule.tolerance,
        num_trials=max(_COLD_TRIALS, rule.num_trials) if cache.is_cold else rule.num_trials,
    )
    cache.lam = torch.where(moves, found.next_lam, cache.lam)
    cache.slope = torch.where(moves, found.slope, cache.slope)
    return found.root
