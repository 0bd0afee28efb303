"""One step of the Spectral Sphere Optimizer on a batch of matrices (arXiv 2601.08393).

Steepest descent under the spectral norm with the weight held on a spectral sphere. Algorithm 1 of the
paper, after the momentum: find ``(sigma, u, v)`` of ``W``, retract ``W`` to the sphere, find ``lam``
with ``<u v^T, msign(M + lam u v^T)> = 0``, and step along that ``msign``. MuonSphere is the same
without the search.

The same body works on whole matrices and on matrices whose rows are cut over ranks: with ``all_reduce``,
the sum over those ranks, every product that contracts the cut dimension is summed, and ``u`` is this
rank's part of the left singular vector.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sso_megatron.linalg.coefficients import Coefficients
from sso_megatron.linalg.polar import AllReduce, divide_, frobenius_norm
from sso_megatron.linalg.polar_line import CutLine, PolarFactor, PolarLine, WholeLine, add_rank_one
from sso_megatron.linalg.power_iteration import TopSingular, power_iteration, start_basis
from sso_megatron.linalg.precision import float32_products
from sso_megatron.linalg.root_finding import bisect_root, track_root
from sso_megatron.linalg.symmetric import PLAIN, Products
from sso_megatron.linalg.tangent import TangentRotation, rotate_to_tangent


@dataclass(frozen=True)
class SSORule:
    """How the step is taken; every number that does not change from matrix to matrix.

    Attributes:
        coefficients: Newton-Schulz polynomials of ``msign``.
        tangent: ``solve``, ``project`` or ``none``.
        solver: ``tracking`` or ``bisection``; matters for ``solve`` alone.
        num_trials: trials of the tracking solver once it is warm.
        tolerance: on ``|h(lam)|``, where bisection stops.
        max_iterations: halvings of the bisection.
        hard_retraction: scale to the radius exactly; otherwise by ``1 +- alpha lr``.
        retract_alpha: ``alpha`` of the dynamic retraction (eq. 34).
        power_block: columns of the power iteration.
        power_degree: degree of its filter.
        products: how those of ``msign`` on whole float32 matrices are made.
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
    products: Products = PLAIN


@dataclass
class SpectralCache:
    """What a batch keeps from step to step.

    Attributes:
        basis: ``(b, s, k)`` block of the power iteration.
        lam: ``(b,)`` where the next search for the root starts.
        slope: ``(b,)`` slope of ``h`` at the root.
        h: ``(b,)`` ``h`` that the last search ended with; 1 before the first.
        radius: ``(b,)`` spectral norm R that weights are retracted to.
        is_cold: no search has set lam and slope yet, so that the first may take more trials.
    """

    basis: Tensor
    lam: Tensor
    slope: Tensor
    h: Tensor
    radius: Tensor
    is_cold: bool = True


@dataclass(frozen=True)
class SSOStats:
    """What a step saw, one entry a matrix, on the device; nothing is synchronised.

    Attributes:
        sigma: ``(b,)`` spectral norm of the weight before retraction.
        lam: ``(b,)`` accepted ``lam``.
        residual: ``(b,)`` ``h(lam)`` before it was removed.
        num_trials: ``(b,)`` trials; bisection's are all of ``msign``, of tracking's the last.
        converged: ``(b,)`` whether the search came near enough: bisection to its tolerance; tracking to
            0.3, from where a rotation costs less than a thousandth of the objective.
        nuclear_rank: ``(b,)`` ``||Z||_*^2 / ||Z||_F^2`` of the matrix that ``msign`` was taken of; None
            where nobody asked, and with bisection.
    """

    sigma: Tensor
    lam: Tensor
    residual: Tensor
    num_trials: Tensor
    converged: Tensor
    nuclear_rank: Tensor | None = None


# A start without state: passes of the power iteration (random block, no gap known), and trials of the
# tracking solver.
_COLD_PASSES = 8
_COLD_TRIALS = 12
# How far a step of the tracking solver may always go; in training lam* moves by less, and is up to 0.2.
_REACH = 0.05
# |h| at which tracking has found the root; see SSOStats.
_NEAR = 0.3
# Of |h|: 0.3 counts for nothing, 0.98 for most.
_OUT_OF_SIGHT = 8
# A slope in the middle of what small GPTs show (5 .. 30).
_COLD_SLOPE = 10.0
# First step of the published bracket; lam* was seen between 1e-5 and 0.2.
_BRACKET_STEP = 1e-3


def blank_cache(W: Tensor, rule: SSORule, all_reduce: AllReduce | None = None) -> SpectralCache:
    """Cache of the right shapes for a batch whose state is known and to be filled in; radii are 1."""
    basis = start_basis(W, rule.power_block, rows_are_cut=all_reduce is not None)
    lam = W.new_zeros(W.size(0))
    slope = torch.full_like(lam, _COLD_SLOPE)
    return SpectralCache(basis, lam, slope, h=torch.ones_like(lam), radius=torch.ones_like(lam))


@float32_products("ieee")
def start_cache(W: Tensor, rule: SSORule, all_reduce: AllReduce | None = None) -> SpectralCache:
    """Cache for a batch that has none; its radii are the spectral norms of the weights.

    Args:
        W: ``(b, m, n)`` float32 or float64.
        rule: the step's settings.
        all_reduce: sum over the ranks that hold the other rows; None for whole matrices.
    """
    cache = blank_cache(W, rule, all_reduce)
    top = power_iteration(
        W, cache.basis, degree=rule.power_degree, num_passes=_COLD_PASSES, all_reduce=all_reduce
    )
    # Copied into rows as a loaded one has: QR gives columns, whose products round in another order.
    cache.basis.copy_(top.basis)
    cache.radius = top.sigma
    return cache


def retraction_factor(sigma: Tensor, radius: Tensor, lr: Tensor | float, rule: SSORule) -> Tensor:
    """Factor that takes weights of norm ``sigma`` to, or towards, the sphere of ``radius``, all ``(b,)``.

    Hard: ``R / sigma``. Dynamic: ``1 + alpha lr sign(R - sigma)`` (eq. 34, with the paper's ``lr``).
    """
    if rule.hard_retraction:
        # A weight that became zero cannot be scaled; the update gives it a direction.
        return torch.where(sigma > 0, radius / sigma, 1.0)
    return 1 + rule.retract_alpha * lr * torch.sign(radius - sigma)


@float32_products("ieee")
def retract_to_spectral_sphere_(
    W: Tensor,
    cache: SpectralCache,
    *,
    lr: Tensor | float,
    rule: SSORule,
    all_reduce: AllReduce | None = None,
    gram: Tensor | None = None,
) -> TopSingular:
    """Find the top singular triplet of every ``W`` and scale it to the sphere, in place.

    Args:
        W: ``(b, m, n)`` float32 or float64.
        cache: its basis is used and updated in place, its radius used.
        lr: learning rate, a number or a 0-d tensor, which dynamic retraction needs.
        rule: the step's settings.
        all_reduce: sum over the ranks that hold the other rows; None for whole matrices.
        gram: ``(b, n, n)`` ``W^T W`` of all rows, where it is known already.

    Returns:
        The triplet of the weight before it was scaled.
    """
    top = power_iteration(W, cache.basis, degree=rule.power_degree, all_reduce=all_reduce, gram=gram)
    cache.basis.copy_(top.basis)
    W.mul_(retraction_factor(top.sigma, cache.radius, lr, rule)[:, None, None])
    return top


@float32_products("ieee")
def sso_step_(
    W: Tensor,
    N: Tensor,
    cache: SpectralCache,
    *,
    scale: Tensor | float,
    lr: Tensor | float,
    rule: SSORule,
    all_reduce: AllReduce | None = None,
    measures: bool = False,
) -> SSOStats:
    """Retract, solve, update: ``W <- retract(W) - lr * scale * Phi`` in place.

    Args:
        W: ``(b, m, n)`` weights, float32 or float64, whole logical matrices or this rank's rows.
        N: ``(b, m, n)`` momentum direction, same dtype; its memory is worked in.
        cache: used, and updated in place once it is warm: a replayed CUDA graph finds it where it was.
        scale: factor of the update, of all or ``(b,)``.
        lr: learning rate, a number or a 0-d tensor on the device, whose value may change between replays.
        rule: the step's settings.
        all_reduce: sum over the ranks that hold the other rows; None for whole matrices. It is called
            twice a step, with ``(b, n, n + 1)`` and ``(b, n + 1)`` float64 numbers.
        measures: whether the nuclear rank is wanted.
    """
    if all_reduce is None:
        top = retract_to_spectral_sphere_(W, cache, lr=lr, rule=rule)
        norm = frobenius_norm(N)
        line: PolarLine = WholeLine(divide_(N, norm), top, rule.coefficients, rule.products)
    else:
        M = N.double()
        weight_gram, momentum_gram = _summed_grams(W, M, all_reduce)
        top = retract_to_spectral_sphere_(
            W, cache, lr=lr, rule=rule, all_reduce=all_reduce, gram=weight_gram
        )
        norm = momentum_gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).sqrt()
        momentum_gram = divide_(divide_(momentum_gram, norm), norm)
        line = CutLine(divide_(M, norm), momentum_gram, top, rule.coefficients, all_reduce)
    # A momentum that is zero, or subnormal all over, has no direction, and msign(lam u v^T) would be a
    # step along the weight itself.
    moves = norm >= torch.finfo(W.dtype).tiny
    Phi, stats = _direction(line, top, moves, cache, rule, measures)
    W.addcmul_(Phi, (moves.to(Phi.dtype) * scale * -lr).to(Phi.dtype)[:, None, None])
    return stats


def _summed_grams(W: Tensor, M: Tensor, all_reduce: AllReduce) -> tuple[Tensor, Tensor]:
    """``W^T W`` in W's dtype and ``M^T M`` in float64, of all rows.

    Both are symmetric: the lower triangle of one and the upper of the other travel as one matrix.
    """
    packed = torch.cat([W.mT @ W, W.new_empty(*W.shape[::2], 1)], dim=-1).to(M.dtype)
    momentum = M.mT @ M
    packed[..., :-1].tril_().add_(momentum.triu(1))
    packed[..., -1] = momentum.diagonal(dim1=-2, dim2=-1)
    packed = all_reduce(packed)
    both, diagonal = packed[..., :-1], packed[..., -1]
    weight, momentum = both.tril(), both.triu(1)
    weight, momentum = weight + weight.tril(-1).mT, momentum + momentum.mT
    momentum.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    return weight.to(W.dtype), momentum


def _direction(
    line: PolarLine, top: TopSingular, moves: Tensor, cache: SpectralCache, rule: SSORule, measures: bool
) -> tuple[Tensor, SSOStats]:
    """The update's direction ``Phi``, and what was seen on the way to it."""
    if rule.tangent == "solve":
        if rule.solver == "bisection":
            return _bisect(line, top, cache, rule)
        return _track(line, top, moves, cache, rule, measures)
    factor = line.factor()
    h = (factor.w * factor.v).sum(dim=-1)
    once = torch.ones_like(h, dtype=torch.int64)
    nuclear_rank = factor.nuclear_rank if measures else None
    found = h.abs() <= rule.tolerance
    stats = SSOStats(top.sigma, torch.zeros_like(top.sigma), h, once, found, nuclear_rank)
    if rule.tangent == "none":
        return factor.matrix(), stats
    return factor.changed((-h[:, None] * factor.u).unsqueeze(-1), factor.v.unsqueeze(-1)), stats


def _track(
    line: PolarLine, top: TopSingular, moves: Tensor, cache: SpectralCache, rule: SSORule, measures: bool
) -> tuple[Tensor, SSOStats]:
    """Go on from the last step's ``lam``, and rotate what is left of ``h`` away."""

    def accept(lam: Tensor) -> tuple[Tensor, tuple[PolarFactor, TangentRotation]]:
        factor = line.factor(lam)
        rotation = rotate_to_tangent(factor)
        return rotation.h.to(lam.dtype), (factor, rotation)

    num_trials = max(_COLD_TRIALS, rule.num_trials) if cache.is_cold else rule.num_trials
    measure = line.measure_fully if cache.is_cold else line.measure
    # A momentum that is nearly Theta, of which only lam = -<Theta, M> leaves anything else, is farther away
    # than lam is in training.
    along = line.along.to(cache.lam.dtype)
    # Where the last h was nearly 1 the root was out of sight, or no search was made yet: start anew where
    # nothing is left along Theta. Smoothly, for the sake of layouts that differ by rounding.
    anew = cache.h.abs() ** _OUT_OF_SIGHT
    lam, slope = torch.lerp(cache.lam, -along, anew), cache.slope * (_COLD_SLOPE / cache.slope) ** anew
    reach = along.abs().clamp_min(_REACH)
    found = track_root(measure, accept, lam, slope, reach=reach, num_trials=num_trials)
    cache.is_cold = False
    for kept, value in ((cache.lam, found.next_lam), (cache.slope, found.slope), (cache.h, found.value)):
        kept.copy_(torch.where(moves, value, kept))
    trials = torch.full_like(found.lam, num_trials, dtype=torch.int64)
    factor, rotation = found.extra
    nuclear_rank = factor.nuclear_rank if measures else None
    is_near = found.value.abs() <= _NEAR
    stats = SSOStats(top.sigma, found.lam, found.value, trials, is_near, nuclear_rank)
    return factor.changed(rotation.left, rotation.right), stats


def _bisect(
    line: PolarLine, top: TopSingular, cache: SpectralCache, rule: SSORule
) -> tuple[Tensor, SSOStats]:
    """The published search, and what it leaves of ``h`` subtracted."""
    root = bisect_root(
        line.evaluate,
        torch.zeros_like(top.sigma),
        first_step=_BRACKET_STEP,
        # |lam*| <= 2 ||M||_* (theorem A.3), and ||M||_* <= sqrt(rank) for ||M||_F = 1.
        bound=2 * math.sqrt(cache.basis.size(-2)),
        tolerance=rule.tolerance,
        max_iterations=rule.max_iterations,
    )
    Phi = line.accept(root.lam, root.extra)
    u, v = top.u.to(Phi.dtype), top.v.to(Phi.dtype)
    Phi = add_rank_one(Phi, -root.value.to(Phi.dtype), u, v)
    stats = SSOStats(top.sigma, root.lam, root.value, root.num_trials, root.converged)
    return Phi, stats
