"""Finds the top singular triplet by Chebyshev-filtered block power iteration with a warm start.

Weights trained by SSO have many singular values close to the largest one (the tangent constraint
holds back one direction while the others rise to the sphere), and there a single vector
under-estimates the norm by many per cent. A block with Rayleigh-Ritz does not; a Chebyshev filter
between the block's smallest Ritz value and its largest makes each product count for several plain ones.

Nothing here waits for the device: ``torch.linalg.eigh`` would, so the small eigenproblems are solved by
repeated squaring.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sso_megatron.linalg.orthonormal import random_basis
from sso_megatron.linalg.polar import AllReduce, times, times_thin

# Squarings of a k x k matrix of Ritz values: the 2^24th power separates values that differ by 1e-7,
# the 2^8th gives the largest itself to 2 %, enough for the filter's interval.
_VECTOR_SQUARINGS, _VALUE_SQUARINGS = 24, 8


class TopSingular(NamedTuple):
    """The result of ``power_iteration`` for a batch of ``b`` matrices ``(m, n)``.

    Attributes:
        sigma: ``(b,)`` largest Ritz value: a lower bound of the spectral norm.
        u: ``(b, m)`` left singular vectors, unit length (zero for a zero matrix); where the rows are
            sharded, this rank's shard of them.
        v: ``(b, n)`` right singular vectors, unit length.
        basis: ``(b, s, k)`` orthonormal block to start the next call from.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor
    basis: Tensor


def start_basis(W: Tensor, block_size: int, *, rows_are_cut: bool = False) -> Tensor:
    """Return an orthonormal ``(b, s, k)`` block to start from, the same on every rank and device.

    Args:
        W: ``(b, m, n)``; gives shape, dtype and device.
        block_size: ``k``; no more than ``s`` columns are made.
        rows_are_cut: whether ``s`` is ``n``, the side that is not sharded; else it is ``min(m, n)``.
    """
    side = W.size(-1) if rows_are_cut else min(W.shape[-2:])
    return random_basis(side, block_size, W)


def power_iteration(
    W: Tensor,
    basis: Tensor,
    *,
    degree: int,
    num_passes: int = 1,
    all_reduce: AllReduce | None = None,
    gram: Tensor | None = None,
) -> TopSingular:
    """Return ``(sigma, u, v)`` of every matrix of a batch, and the block for the next call.

    On whole matrices one pass costs ``2 degree + 1`` products of ``W`` with ``k`` vectors, one QR and
    some fifty products of ``k x k`` matrices. Where rows are sharded the products go through the Gram
    matrix ``W^T W``, which is summed once: one ``all_reduce`` however many passes.

    Args:
        W: ``(b, m, n)``, float32 or float64.
        basis: ``(b, s, k)`` with orthonormal columns: ``start_basis`` or the last call's.
        degree: degree of the Chebyshev polynomial in the Gram matrix, at least 1.
        num_passes: filter, orthonormalise and choose this many times; more for a cold start.
        all_reduce: sum over the ranks that hold the other rows; None for whole matrices.
        gram: ``(b, n, n)`` sum of ``W^T W`` over the ranks, where it is known already.
    """
    is_tall = all_reduce is not None or W.size(-2) >= W.size(-1)
    tall = W if is_tall else W.mT
    if all_reduce is not None and gram is None:
        gram = all_reduce(tall.mT @ tall)

    def apply(V: Tensor) -> Tensor:
        return times_thin(tall.mT, times_thin(tall, V)) if gram is None else times_thin(gram, V)

    for _ in range(num_passes):
        if basis.size(-1) < basis.size(-2):  # a full basis is exact without a filter
            basis = torch.linalg.qr(_chebyshev_filter(apply, basis, degree)).Q
        image = times_thin(tall if gram is None else gram, basis)
        ritz = (image if gram is None else basis).mT.double() @ image.double()
        weights = top_eigenvector(ritz).to(W.dtype).unsqueeze(-1)
    short_vector, image_vector = (basis @ weights).squeeze(-1), (image @ weights).squeeze(-1)
    if gram is None:
        long_vector = image_vector
        sigma = torch.linalg.vector_norm(long_vector, dim=-1)
    else:
        long_vector = times(tall, short_vector)
        sigma = (short_vector * image_vector).sum(dim=-1).clamp_min(0).sqrt()
    long_vector = long_vector / sigma.clamp_min(torch.finfo(W.dtype).tiny).unsqueeze(-1)
    if is_tall:
        return TopSingular(sigma, long_vector, short_vector, basis)
    return TopSingular(sigma, short_vector, long_vector, basis)


def top_eigenvector(A: Tensor) -> Tensor:
    """Return a unit eigenvector ``(b, k)`` of the largest eigenvalue of positive semi-definite matrices.

    Where other eigenvalues are within 1e-7 of the largest, the vector is some mixture of theirs; for a
    zero matrix it is the first unit vector.

    Args:
        A: ``(b, k, k)`` float64, symmetric.
    """
    power = A
    for _ in range(_VECTOR_SQUARINGS):
        _, power = _over_trace(power)
        power = power @ power
    # All columns of a power of rank one are the vector; the one with the largest entry is the safest.
    best = power.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    vector = power.gather(-1, best[:, None, None].expand(-1, A.size(-1), 1)).squeeze(-1)
    vector[:, 0] += (vector == 0).all(dim=-1)
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)


def _largest_eigenvalue(A: Tensor) -> Tensor:
    """Return the largest eigenvalues ``(b,)`` of matrices, never too small and at most 2 % too large.

    Args:
        A: ``(b, k, k)`` float64, positive semi-definite.
    """
    logarithm = torch.zeros_like(A[:, 0, 0])
    for squaring in range(_VALUE_SQUARINGS + 1):
        trace, A = _over_trace(A)
        logarithm = logarithm + trace.log() / 2**squaring
        A = A @ A
    return logarithm.exp()


def _over_trace(A: Tensor) -> tuple[Tensor, Tensor]:
    """Return the trace, and ``A`` divided by it; a zero matrix stays zero."""
    trace = A.diagonal(dim1=-2, dim2=-1).sum(dim=-1).clamp_min(torch.finfo(A.dtype).tiny)
    return trace, A / trace[:, None, None]


def _chebyshev_filter(apply: Callable[[Tensor], Tensor], V: Tensor, degree: int) -> Tensor:
    """Return ``p(A) V`` with ``|p| <= p(theta_k)`` below the smallest Ritz value and steep above it.

    The three-term recurrence is scaled to 1 at the largest Ritz value (Zhou and Saad's scaled form),
    so nothing overflows however far apart the singular values are.

    Args:
        apply: product with the positive semi-definite ``A``, ``(b, s, s)``.
        V: ``(b, s, k)``, orthonormal columns.
        degree: at least 1.
    """
    Y = apply(V)
    ritz = V.mT.double() @ Y.double()
    top = _largest_eigenvalue(ritz)
    unit = torch.eye(V.size(-1), dtype=ritz.dtype, device=ritz.device)
    bottom = top - _largest_eigenvalue(top[:, None, None] * unit - ritz)
    top, bottom = (x.to(V.dtype)[:, None, None] for x in (top, bottom))
    top = top.clamp_min(torch.finfo(V.dtype).tiny)
    # The damped interval [0, cut]; a floor keeps the recurrence finite for rank-deficient matrices.
    half = torch.maximum(bottom, 1e-6 * top) / 2
    first = half / (top - half)
    scale = first
    previous, current = V, (Y - half * V) * (first / half)
    for _ in range(degree - 1):
        next_scale = 1 / (2 / first - scale)
        step = (2 * next_scale / half) * (apply(current) - half * current)
        previous, current = current, step - (scale * next_scale) * previous
        scale = next_scale
    return current
