"""One step of the Spectral Sphere Optimizer on a batch of matrices (arXiv 2601.08393).

Steepest descent under the spectral norm with the weight held on a spectral sphere. Algorithm 1 of the
paper, after the momentum: find ``(sigma, u, v)`` of ``W``, retract ``W`` to the sphere, find ``lam``
with ``<u v^T, msign(M + lam u v^T)> = 0``, and step along that ``msign``. MuonSphere is the same
without the search.

The same body works on whole matrices and on matrices whose rows are cut over ranks: with ``total``,
the sum over those ranks, every product that contracts the cut dimension is summed, and ``u`` is this
rank's part of the left singular vector.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.linalg.polar import Total, frobenius_norm, frobenius_normalize
from sso_megatron.linalg.polar_line import PolarLine, add_rank_one, polar_line
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
        basis: ``(b, s, k)`` block of the power iteration.
        lam: ``(b,)`` where the next search for the root starts.
        slope: ``(b,)`` slope of ``h`` at the root.
        radius: ``(b,)`` spectral norm R that weights are retracted to.
        is_cold: no search has set lam and slope yet, so that the first may take more trials.
    """

    basis: Tensor
    lam: Tensor
    slope: Tensor
    radius: Tensor
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


def blank_cache(W: Tensor, rule: SSORule, total: Total | None = None) -> SpectralCache:
    """Cache of the right shapes for a batch whose state is known and to be filled in; radii are 1."""
    basis = start_basis(W, rule.power_block, rows_are_cut=total is not None)
    lam = W.new_zeros(W.size(0))
    return SpectralCache(basis, lam, torch.full_like(lam, _COLD_SLOPE), radius=torch.ones_like(lam))


def start_cache(W: Tensor, rule: SSORule, total: Total | None = None) -> SpectralCache:
    """Cache for a batch that has none; its radii are the spectral norms of the weights.

    Args:
        W: ``(b, m, n)`` float32 or float64.
        rule: the step's settings.
        total: sum over the ranks that hold the other rows; None for whole matrices.
    """
    cache = blank_cache(W, rule, total)
    top = power_iteration(W, cache.basis, degree=rule.power_degree, num_passes=_COLD_PASSES, total=total)
    cache.basis, cache.radius = top.basis, top.sigma
    return cache


def retraction_factor(sigma: Tensor, radius: Tensor, lr: float, rule: SSORule) -> Tensor:
    """Factor that takes weights of norm ``sigma`` to, or towards, the sphere of ``radius``, all ``(b,)``.

    Hard: ``R / sigma``. Dynamic: ``1 + alpha lr sign(R - sigma)`` (eq. 34, with the paper's ``lr``).
    """
    if rule.hard_retraction:
        # A weight that became zero cannot be scaled; the update gives it a direction.
        return torch.where(sigma > 0, radius / sigma, 1.0)
    return 1 + rule.retract_alpha * lr * torch.sign(radius - sigma)


def retract_to_spectral_sphere_(
    W: Tensor,
    cache: SpectralCache,
    *,
    lr: float,
    rule: SSORule,
    total: Total | None = None,
) -> TopSingular:
    """Find the top singular triplet of every ``W`` and scale it to the sphere, in place.

    Args:
        W: ``(b, m, n)`` float32 or float64.
        cache: its basis is used and replaced, its radius used.
        lr: learning rate, which dynamic retraction needs.
        rule: the step's settings.
        total: sum over the ranks that hold the other rows; None for whole matrices.

    Returns:
        The triplet of the weight before it was scaled.
    """
    top = power_iteration(W, cache.basis, degree=rule.power_degree, total=total)
    cache.basis = top.basis
    W.mul_(retraction_factor(top.sigma, cache.radius, lr, rule)[:, None, None])
    return top


def sso_step_(
    W: Tensor,
    N: Tensor,
    cache: SpectralCache,
    *,
    scale: Tensor | float,
    lr: float,
    rule: SSORule,
    total: Total | None = None,
) -> SSOStats:
    """Retract, solve, update: ``W <- retract(W) - lr * scale * Phi`` in place.

    Args:
        W: ``(b, m, n)`` weights, float32 or float64, whole logical matrices or this rank's rows.
        N: ``(b, m, n)`` momentum direction, same dtype.
        cache: used and updated.
        scale: factor of the update, of all or ``(b,)``.
        lr: learning rate.
        rule: the step's settings.
        total: sum over the ranks that hold the other rows; None for whole matrices. It is called three
            times a step, with ``(b, n, n)``, ``(b,)`` and ``(b, n + 1, n + 1)`` numbers.
    """
    top = retract_to_spectral_sphere_(W, cache, lr=lr, rule=rule, total=total)
    norm = frobenius_norm(N, total)
    line = polar_line(frobenius_normalize(N, norm), top, norm > 0, rule.coefficients, total)
    lam, num_trials, trial = (
        torch.zeros_like(top.sigma),
        torch.ones_like(top.sigma, dtype=torch.int64),
        None,
    )
    if rule.tangent == "solve":
        root = _solve(line, top, norm > 0, cache, rule)
        lam, num_trials, trial = root.lam, root.num_trials, (root.value, root.extra)
    h, Phi = line.accept(lam, trial)
    if rule.tangent != "none":
        # <Theta, Phi> = h exactly, so this puts Phi on the tangent space whatever the search left.
        Phi = add_rank_one(Phi, -h, top.u, top.v)
    if isinstance(scale, Tensor):
        W.addcmul_(Phi, scale[:, None, None], value=-lr)
    else:
        W.add_(Phi, alpha=-lr * scale)
    return SSOStats(top.sigma, lam, h, num_trials, h.abs() <= rule.tolerance)


def _solve(line: PolarLine, top: TopSingular, moves: Tensor, cache: SpectralCache, rule: SSORule) -> Root:
    """``lam`` with ``h(lam) = <u v^T, msign(M + lam u v^T)> = 0``."""
    if rule.solver == "bisection":
        return bisect_root(
            line.evaluate,
            torch.zeros_like(top.sigma),
            first_step=_BRACKET_STEP,
            # |lam*| <= 2 ||M||_* (theorem A.3), and ||M||_* <= sqrt(rank) for ||M||_F = 1.
            bound=2 * math.sqrt(cache.basis.size(-2)),
            tolerance=rule.tolerance,
            max_iterations=rule.max_iterations,
        )
    found = track_root(
        line.evaluate,
        cache.lam,
        cache.slope,
        tolerance=rule.tolerance,
        num_trials=max(_COLD_TRIALS, rule.num_trials) if cache.is_cold else rule.num_trials,
    )
    cache.is_cold = False
    cache.lam = torch.where(moves, found.next_lam, cache.lam)
    cache.slope = torch.where(moves, found.slope, cache.slope)
    return found.root
